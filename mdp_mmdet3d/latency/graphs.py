"""One small ONNX model per operator, in a context that resembles the network it runs in.

The operator's kind (`mdp_mmdet3d.operators`) says what the model holds, the builder here writes it.
Nodes and their outputs are named by their part: ``source`` and ``sink`` only provide the layout that
the operator meets in a network, ``offset`` is to be subtracted, the rest, ``target``, is what is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mdp_mmdet3d.extras import needs
from mdp_mmdet3d.operators import OPERATORS, OperatorSignature

with needs("latency", "measuring operators"):
    import onnx
    from onnx import helper, numpy_helper

OPSET = 17


_REFERENCE = OperatorSignature.make(
    "conv",
    batch=1,
    height=32,
    width=88,
    kernel_h=3,
    kernel_w=3,
    stride=1,
    padding=1,
    groups=1,
    relu=True,
    residual=False,
)


Precision = Literal["float32", "float16"]


@dataclass(frozen=True)
class OperatorGraph:
    """An ONNX model that runs one operator.

    Attributes:
        model: The model; every input and output has the precision asked for.
        inputs: Shape per graph input.
        copies: How often the operator runs in it.
    """

    model: onnx.ModelProto
    inputs: dict[str, tuple[int, ...]]
    copies: int


def operator_graph(
    signature: OperatorSignature, widths: tuple[int, ...], precision: Precision = "float32"
) -> OperatorGraph:
    """Build the model that measures ``signature`` at ``widths``, all tensors in ``precision``, as it is deployed in it.

    Raises:
        ValueError: A width is 0, or an attribute has a value that cannot be built.
    """
    if min(widths) < 1:
        raise ValueError(f"{signature.key}: cannot build an operator with widths {widths}")
    builder = _Builder(precision)
    operator = OPERATORS[signature.kind]
    copies = operator.graph(builder, signature, operator.deployed_widths(signature, widths, precision))
    return OperatorGraph(builder.finish(), builder.inputs, copies)


def reference_graph(precision: Precision = "float32") -> OperatorGraph:
    """A few milliseconds of dense arithmetic: slows down as soon as anything else uses the core or its twin."""
    return operator_graph(_REFERENCE, (128, 128), precision)


class _Builder:
    """Collects nodes, inputs and random weights of one model."""

    def __init__(self, precision: Precision) -> None:
        self._precision = np.dtype(precision)
        self.inputs: dict[str, tuple[int, ...]] = {}
        self._outputs: list[str] = []
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(0)

    def input(self, name: str, *shape: int) -> str:
        self.inputs[name] = shape
        return name

    def node(self, operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: np.ndarray, *, keep_type: bool = False) -> str:
        if value.dtype.kind == "f" and not keep_type:
            value = value.astype(self._precision)
        self._initializers.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, name: str, fan_in: int, *shape: int) -> str:
        values = self._random.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(fan_in))
        return self.constant(name, values)

    def bias(self, name: str, size: int) -> str:
        return self.constant(name, np.full(size, 0.01, dtype=np.float32))

    def conv(
        self,
        x: str,
        output: str,
        ci: int,
        co: int,
        *,
        kernel: tuple[int, int] = (1, 1),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> str:
        fan_in = ci // groups * kernel[0] * kernel[1]
        weight = self.weight(f"{output}.weight", fan_in, co, ci // groups, *kernel)
        return self.node(
            "Conv",
            [x, weight, self.bias(f"{output}.bias", co)],
            output,
            kernel_shape=list(kernel),
            strides=list(stride),
            pads=[*padding, *padding],
            group=groups,
            **({} if dilation == (1, 1) else {"dilations": list(dilation)}),
        )

    def linear(self, x: str, output: str, fan_in: int, fan_out: int) -> str:
        product = self.node("MatMul", [x, self.weight(f"{output}.weight", fan_in, fan_in, fan_out)], f"{output}.matmul")
        return self.node("Add", [product, self.bias(f"{output}.bias", fan_out)], output)

    def layer_norm(self, x: str, output: str, size: int) -> str:
        gain = self.constant(f"{output}.gain", np.ones(size, dtype=np.float32))
        return self.node("LayerNormalization", [x, gain, self.bias(f"{output}.bias", size)], output, axis=-1)

    def reshape(self, x: str, output: str, *shape: int) -> str:
        return self.node("Reshape", [x, self.constant(f"{output}.shape", np.array(shape, dtype=np.int64))], output)

    def pool_sink(self, x: str, output: str = "sink") -> None:
        """End in a global average: one value per channel leaves the model, no map is reordered."""
        self._outputs.append(self.node("GlobalAveragePool", [x], output))

    def token_sink(self, x: str) -> None:
        """End in the first token, which costs next to nothing."""
        bounds = [
            self.constant(f"sink.{name}", np.array([value], dtype=np.int64))
            for name, value in (("start", 0), ("end", 1), ("axis", 1))
        ]
        self._outputs.append(self.node("Slice", [x, *bounds], "sink"))

    def finish(self) -> onnx.ModelProto:
        kind = helper.np_dtype_to_tensor_dtype(self._precision)
        graph = helper.make_graph(
            self._nodes,
            "operator",
            [helper.make_tensor_value_info(name, kind, shape) for name, shape in self.inputs.items()],
            [helper.make_tensor_value_info(name, kind, None) for name in self._outputs],
            self._initializers,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
