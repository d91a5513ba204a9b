"""Any function of PyTorch, called as a traced model calls it: its probe is the exported call itself."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mdp_mmdet3d.operators.base import SOURCE_CHANNELS, GraphBuilder, OperatorKind, OperatorSignature, Work

if TYPE_CHECKING:
    from torch import Tensor, nn

OPSET = 17
FLOAT = 1  # onnx.TensorProto.FLOAT
NO_DATA = frozenset({"Constant", "Identity", "Shape", "Cast", "Reshape", "Squeeze", "Unsqueeze"})


class Call(OperatorKind):
    """A call that depends on as many widths as it has roles.

    ``call`` is JSON: ``function``, its name under ``torch``; ``arguments`` and ``keywords``. A tensor is
    ``{"input": shape}`` or ``{"weight": shape}``; a number that depends on the widths is a sum in writing, for example
    ``"$0"``, ``"8*$0"`` or ``"64+$0+2*$1"``, where ``$0`` is the first width.
    """

    attributes = ("call",)

    def work(self, signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
        """What PyTorch counts on tensors without data."""
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        call = _module(signature, widths)
        inputs = [torch.empty(shape, device="meta") for shape in call.shapes]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            found = call.to("meta")(*inputs)
        tensors = [*inputs, *call.buffers(), *(found if isinstance(found, (tuple, list)) else [found])]
        return Work(counter.get_total_flops() / 2, float(sum(t.numel() for t in tensors)), 1)

    def graph(self, build: GraphBuilder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
        """The exported call; maps come out of convolutions and poolings, tokens out of linear layers."""
        from onnx import helper, numpy_helper

        call = _module(signature, widths)
        model = exported(call)
        names: dict[str, str] = {"": ""}
        for index, shape in enumerate(call.shapes):
            names[f"input{index}"] = _source(build, index, shape)
        for tensor in model.graph.initializer:
            value = numpy_helper.to_array(tensor)
            names[tensor.name] = build.constant(f"target.{tensor.name}", value, keep_type=value.dtype.kind != "f")
        for position, node in enumerate(model.graph.node):
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            output = f"target_{position}"
            if node.op_type == "Constant":
                value = numpy_helper.to_array(attributes["value"])
                names[node.output[0]] = build.constant(output, value, keep_type=value.dtype.kind != "f")
                continue
            if len(node.output) != 1 or any(a.type == a.GRAPH for a in node.attribute):
                raise ValueError(f"{signature.key}: {node.op_type} has several outputs or a graph of its own")
            names[node.output[0]] = build.node(node.op_type, [names[i] for i in node.input], output, **attributes)
        out = names[model.graph.output[0].name]
        if call.rank == 4:
            build.pool_sink(out)
        else:
            build.token_sink(out)
        return 1

    def torch_call(
        self, signature: OperatorSignature, widths: tuple[int, ...]
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The call itself."""
        import torch

        call = _module(signature, widths)
        return call, tuple(torch.randn(shape) for shape in call.shapes)


class Call1(Call):
    """A call that depends on one width."""

    name = "call"
    roles = ("width",)
    samples: ClassVar[Mapping[str, int | None]] = {"width": 4}


class Call2(Call):
    """A call that depends on two widths."""

    name = "call_2"
    roles = ("width_0", "width_1")


class Call3(Call):
    """A call that depends on three widths."""

    name = "call_3"
    roles = ("width_0", "width_1", "width_2")


CALL_KINDS = (Call1.name, Call2.name, Call3.name)
"""Kinds of calls by how many widths they depend on, one, two or three."""


def call_text(function: str, arguments: Any, keywords: Any) -> str:
    """The attribute ``call`` of a signature."""
    content = {"function": function, "arguments": arguments, "keywords": keywords}
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def call_obstacle(signature: OperatorSignature, widths: tuple[int, ...]) -> str | None:
    """Why a call cannot be measured, or None."""
    try:
        model = exported(_module(signature, widths))
    except Exception as error:  # whatever a function or its exporter raises on what was recorded
        return f"has no ONNX form ({type(error).__name__})"
    if any(len(node.output) != 1 for node in model.graph.node):
        return "has an ONNX form with several outputs"
    if model.graph.output[0].type.tensor_type.elem_type != FLOAT:
        return "returns something other than real numbers"
    return None if any(node.op_type not in NO_DATA for node in model.graph.node) else "moves no data"


def number(written: str, widths: Sequence[int]) -> int:
    """Value of a number that depends on ``widths``, e.g. ``"64+2*$0"``."""
    total = 0
    for part in written.split("+"):
        times, _, width = part.rpartition("$")
        total += int(times.rstrip("*") or 1) * widths[int(width)] if "$" in part else int(part)
    return total


def exported(call: nn.Module) -> Any:
    """The ONNX model of what `_module` returned."""
    import onnx
    import torch

    stored = io.BytesIO()
    # Of an operator that it does not know the exporter prints the graph.
    with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            call.eval(),
            tuple(torch.zeros(shape) for shape in call.shapes),
            stored,
            input_names=[f"input{index}" for index in range(len(call.shapes))],
            opset_version=OPSET,
            do_constant_folding=True,
            dynamo=False,
        )
    return onnx.load_from_string(stored.getvalue())


def _module(signature: OperatorSignature, widths: tuple[int, ...]) -> nn.Module:
    import torch

    content = json.loads(signature["call"])
    function: Any = torch
    for part in content["function"].split(".")[1:]:
        function = getattr(function, part)
    made = [_numbers(content[key], widths) for key in ("arguments", "keywords")]
    found: nn.Module = _call_class()(function, *made)
    return found


def _numbers(template: Any, widths: Sequence[int]) -> Any:
    if isinstance(template, dict):
        return {key: _numbers(value, widths) for key, value in template.items()}
    if isinstance(template, list):
        return [_numbers(value, widths) for value in template]
    return number(template, widths) if isinstance(template, str) and "$" in template else template


def _source(build: GraphBuilder, index: int, shape: tuple[int, ...]) -> str:
    """A tensor in the layout that it has in a network. The pooling keeps a runtime from fusing the convolution."""
    if len(shape) == 4:
        seed = build.input(f"seed{index}", shape[0], SOURCE_CHANNELS, *shape[2:])
        x = build.conv(seed, f"source{index}", SOURCE_CHANNELS, shape[1])
        return build.node("MaxPool", [x], f"source{index}_pool", kernel_shape=[1, 1], strides=[1, 1])
    if len(shape) in (2, 3):
        seed = build.input(f"seed{index}", *shape[:-1], SOURCE_CHANNELS)
        return build.linear(seed, f"source{index}", SOURCE_CHANNELS, shape[-1])
    return build.input(f"seed{index}", *shape)


def _call_class() -> Any:
    import torch
    from torch import nn

    class Called(nn.Module):
        """Weights are buffers; the other tensors are the inputs, in the order in which they are written."""

        def __init__(self, function: Any, arguments: Any, keywords: Any) -> None:
            super().__init__()
            self.function, self.arguments, self.keywords = function, arguments, keywords
            self.shapes = [tuple(part["input"]) for part in _parts([arguments, keywords]) if "input" in part]
            generator = torch.Generator().manual_seed(0)
            for index, part in enumerate(p for p in _parts([arguments, keywords]) if "weight" in p):
                # Positive: a variance is among them.
                self.register_buffer(f"weight{index}", 0.5 + torch.rand(part["weight"], generator=generator))

        @property
        def rank(self) -> int:
            with torch.no_grad():
                return self(*(torch.zeros(shape) for shape in self.shapes)).ndim

        def forward(self, *inputs: Tensor) -> Any:
            tensors = {"input": iter(inputs), "weight": iter(self.buffers())}

            def filled(part: Any) -> Any:
                if isinstance(part, dict) and len(part) == 1 and (kind := next(iter(part))) in tensors:
                    return next(tensors[kind])
                if isinstance(part, dict):
                    return {key: filled(value) for key, value in part.items()}
                return [filled(value) for value in part] if isinstance(part, list) else part

            arguments, keywords = filled(self.arguments), filled(self.keywords)
            return self.function(*arguments, **keywords)

    return Called


def _parts(template: Any) -> Iterator[dict[str, Any]]:
    """Tensors of a template, in order."""
    if isinstance(template, dict) and len(template) == 1 and next(iter(template)) in ("input", "weight"):
        yield template
    elif isinstance(template, dict):
        for value in template.values():
            yield from _parts(value)
    elif isinstance(template, list):
        for value in template:
            yield from _parts(value)
