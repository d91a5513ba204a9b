"""One small ONNX model per operator, in a context that resembles the network it runs in.

Nodes and their outputs are named by their part: ``source`` and ``sink`` only provide the layout that
the operator meets in a network, ``offset`` is to be subtracted, the rest, ``target``, is what is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mdp_mmdet3d.space import OperatorSignature

OPSET = 17
SOURCE_CHANNELS = 16
DECODER_COPIES = 2


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
    """Build the model that measures ``signature`` at ``widths``, all tensors in ``precision``.

    Raises:
        ValueError: A width is 0, or an attribute has a value that cannot be built.
    """
    if min(widths) < 1:
        raise ValueError(f"{signature.key}: cannot build an operator with widths {widths}")
    builder = _Builder(precision)
    copies = _BUILDERS[signature.kind](builder, signature, widths)
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
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
    ) -> str:
        fan_in = ci // groups * kernel[0] * kernel[1]
        weight = self.weight(f"{output}.weight", fan_in, co, ci // groups, *kernel)
        return self.node(
            "Conv",
            [x, weight, self.bias(f"{output}.bias", co)],
            output,
            kernel_shape=list(kernel),
            strides=[stride, stride],
            pads=[padding] * 4,
            group=groups,
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


def _conv(build: _Builder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
    ci, co = widths
    batch, height, width = signature["batch"], signature["height"], signature["width"]
    kernel = (signature["kernel_h"], signature["kernel_w"])
    stride, padding = signature["stride"], signature["padding"]
    if ci < SOURCE_CHANNELS:
        x = build.input("image", batch, ci, height, width)
    else:
        x = build.conv(build.input("seed", batch, SOURCE_CHANNELS, height, width), "source", SOURCE_CHANNELS, ci)
    out = "target"
    if signature["residual"]:
        rows = (height + 2 * padding - kernel[0]) // stride + 1
        columns = (width + 2 * padding - kernel[1]) // stride + 1
        # ONNX Runtime fuses an addend only if it comes from a convolution and feeds nothing else; behind a ReLU, as in
        # the network, TensorRT adds it in the measured convolution and not in the one that makes it.
        shortcut = build.conv(
            build.input("shortcut_seed", batch, SOURCE_CHANNELS, rows, columns),
            "source_shortcut",
            SOURCE_CHANNELS,
            co,
        )
        shortcut = build.node("Relu", [shortcut], "source_shortcut_relu")
        x = build.conv(x, "target", ci, co, kernel=kernel, stride=stride, padding=padding, groups=signature["groups"])
        out = build.node("Add", [x, shortcut], "target_sum")
    else:
        out = build.conv(x, "target", ci, co, kernel=kernel, stride=stride, padding=padding, groups=signature["groups"])
    if signature["relu"]:
        out = build.node("Relu", [out], "target_relu")
    build.pool_sink(out)
    return 1


def _max_pool(build: _Builder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
    seed = build.input("seed", signature["batch"], SOURCE_CHANNELS, signature["height"], signature["width"])
    x = build.conv(seed, "source", SOURCE_CHANNELS, widths[0])
    kernel, stride = signature["kernel"], signature["stride"]
    build.pool_sink(
        build.node(
            "MaxPool",
            [x],
            "target",
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[signature["padding"]] * 4,
        )
    )
    return 1


def _upsample_add(build: _Builder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
    batch, height, width, channels = signature["batch"], signature["height"], signature["width"], widths[0]
    fine_seed = build.input("fine_seed", batch, SOURCE_CHANNELS, height, width)
    coarse_seed = build.input("coarse_seed", batch, SOURCE_CHANNELS, -(-height // 2), -(-width // 2))
    coarse = build.conv(coarse_seed, "source_coarse", SOURCE_CHANNELS, channels)
    if height % 2 or width % 2:
        size = ["", "", build.constant("sizes", np.array([batch, channels, height, width], dtype=np.int64))]
    else:
        size = ["", build.constant("scales", np.array([1, 1, 2, 2], dtype=np.float32), keep_type=True)]
    upsampled = build.node(
        "Resize",
        [coarse, *size],
        "target_upsampled",
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    # The addition runs inside the fine convolution: its cost is what an equal one without it does not take.
    fine = build.conv(fine_seed, "target_fine", SOURCE_CHANNELS, channels)
    build.pool_sink(build.node("Add", [fine, upsampled], "target"))
    build.pool_sink(build.conv(fine_seed, "offset_fine", SOURCE_CHANNELS, channels), "sink_offset")
    return 1


def _linear(build: _Builder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
    fan_in, fan_out = widths
    x = build.input("seed", 1, signature["tokens"], SOURCE_CHANNELS)
    x = build.linear(build.linear(x, "source", SOURCE_CHANNELS, fan_in), "target", fan_in, fan_out)
    if signature["norm"] == "layer":
        x = build.layer_norm(x, "target_norm", fan_out)
    elif signature["norm"] != "none":
        raise ValueError(f"{signature.key}: norm must be 'none' or 'layer'")
    if signature["activation"] == "relu":
        x = build.node("Relu", [x], "target_relu")
    elif signature["activation"] != "none":
        raise ValueError(f"{signature.key}: activation must be 'none' or 'relu'")
    build.token_sink(x)
    return 1


def _attention(build: _Builder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
    heads, qk_width, v_width = widths
    queries, keys, size = signature["queries"], signature["keys"], signature["embed_dims"]
    x = build.input("queries", 1, queries, size)
    query_position = build.input("query_position", 1, queries, size)
    key_position = build.input("key_position", 1, keys, size)
    memory = (
        build.input("memory", 1, keys - queries if signature["shared"] else keys, size)
        if not signature["shared"] or keys > queries
        else ""
    )
    if not signature["shared"]:
        shared_key = build.node("Add", [memory, key_position], "source_key")
    for copy in range(DECODER_COPIES):
        name = f"target{copy}"
        if signature["shared"]:
            value = build.node("Concat", [x, memory], f"{name}_value_in", axis=1) if memory else x
            key = build.node("Add", [value, key_position], f"{name}_key_in")
        else:
            key, value = shared_key, memory
        query = build.node("Add", [x, query_position], f"{name}_query_in")
        q = _heads(
            build,
            build.linear(query, f"{name}_q", size, heads * qk_width),
            queries,
            heads,
            qk_width,
            (0, 2, 1, 3),
        )
        k = _heads(build, build.linear(key, f"{name}_k", size, heads * qk_width), keys, heads, qk_width, (0, 2, 3, 1))
        v = _heads(build, build.linear(value, f"{name}_v", size, heads * v_width), keys, heads, v_width, (0, 2, 1, 3))
        scale = build.constant(f"{name}_scale", np.array(qk_width**-0.5, dtype=np.float32))
        scores = build.node("Mul", [build.node("MatMul", [q, k], f"{name}_product"), scale], f"{name}_scores")
        weights = build.node("Softmax", [scores], f"{name}_softmax", axis=-1)
        mixed = build.node(
            "Transpose",
            [build.node("MatMul", [weights, v], f"{name}_mixed")],
            f"{name}_merged",
            perm=[0, 2, 1, 3],
        )
        mixed = build.reshape(mixed, f"{name}_flat", 1, queries, heads * v_width)
        out = build.linear(mixed, f"{name}_out", heads * v_width, size)
        x = build.layer_norm(build.node("Add", [x, out], f"{name}_sum"), f"{name}_norm", size)
    build.token_sink(x)
    return DECODER_COPIES


def _heads(build: _Builder, x: str, tokens: int, heads: int, width: int, order: tuple[int, ...]) -> str:
    split = build.reshape(x, f"{x}_split", 1, tokens, heads, width)
    return build.node("Transpose", [split], f"{x}_heads", perm=list(order))


def _ffn(build: _Builder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
    size = signature["embed_dims"]
    x = build.input("queries", 1, signature["tokens"], size)
    for copy in range(DECODER_COPIES):
        name = f"target{copy}"
        hidden = build.node("Relu", [build.linear(x, f"{name}_up", size, widths[0])], f"{name}_relu")
        out = build.linear(hidden, f"{name}_down", widths[0], size)
        x = build.layer_norm(build.node("Add", [x, out], f"{name}_sum"), f"{name}_norm", size)
    build.token_sink(x)
    return DECODER_COPIES


_BUILDERS: dict[str, Callable[[_Builder, OperatorSignature, tuple[int, ...]], int]] = {
    "conv": _conv,
    "max_pool": _max_pool,
    "upsample_add": _upsample_add,
    "linear": _linear,
    "attention": _attention,
    "ffn": _ffn,
}
