"""Cost terms of convolutions and linear layers from the calls of modules: with what a runtime fuses with each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mdp_mmdet3d.adapters.residual_blocks import ResidualBlock
from mdp_mmdet3d.layers.attention import has_independent_widths
from mdp_mmdet3d.layers.fused import without_fused_layers
from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.calls import Call
from mdp_mmdet3d.space.conv_terms import add_conv_term
from mdp_mmdet3d.space.operations import Operation, readers_of

Shapes = dict[str, list[tuple[int, ...]]]


def record_input_shapes(model: nn.Module, forward: Callable[[], Any]) -> Shapes:
    """Shape of the first input of every call of every convolution and linear layer, by path.

    An attention with a packed ``in_proj_weight`` has that of its queries, and that of its keys under ``<path>.key``.
    """
    shapes: Shapes = defaultdict(list)

    def note(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            first = inputs[0] if inputs else named.get("query", next(iter(named.values())))
            shapes[name].append(tuple(first.shape))
            if _takes_keys(module):
                shapes[f"{name}.key"].append(tuple((inputs[1] if len(inputs) > 1 else named["key"]).shape))

        return record

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) or _takes_keys(module)
    ]
    try:
        with without_fused_layers():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return dict(shapes)


def _takes_keys(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or has_independent_widths(module)


@dataclass(frozen=True)
class LinearUnit:
    """A call of a linear layer with what runs on its result alone.

    Attributes:
        norm: ``"layer"``, with weights, or ``"none"``.
        activation: ``"relu"`` or ``"none"``.
        positions: Of norm and activation among the operations.
        constant: Whether the call is folded at export.
    """

    norm: str
    activation: str
    positions: tuple[int, ...]
    constant: bool


def linear_units(model: nn.Module, operations: Sequence[Operation]) -> dict[tuple[str, int], LinearUnit]:
    """By path of the linear layer and how many calls came before."""
    readers = readers_of(operations)
    units: dict[tuple[str, int], LinearUnit] = {}
    for position, operation in enumerate(operations):
        if operation.name != "linear" or not isinstance(model.get_submodule(operation.module), nn.Linear):
            continue
        found: dict[str, int] = {}
        end = position
        for name in ("layer_norm", "relu"):
            following = _only_reader(operations, readers, end)
            if following is not None and _is(operations[following], name):
                found[name] = end = following
        units[operation.module, operation.index] = LinearUnit(
            "layer" if "layer_norm" in found else "none",
            "relu" if "relu" in found else "none",
            tuple(found.values()),
            operation.constant,
        )
    return units


def _is(operation: Operation, name: str) -> bool:
    return operation.name == name and (name != "layer_norm" or operation.keywords.get("weight") is not None)


def _only_reader(operations: Sequence[Operation], readers: dict[int, list[int]], position: int) -> int | None:
    """What alone reads a result, past operations that return it unchanged such as a dropout."""
    while len(readers.get(position, ())) == 1:
        (position,) = readers[position]
        if not operations[position].view:
            return position
        if operations[position].name not in ("dropout", "identity"):
            return None
    return None


def add_network_terms(
    builder: SpaceBuilder,
    calls: Sequence[Call],
    shapes: Shapes,
    blocks: Sequence[ResidualBlock],
    engine: str,
    operations: Sequence[Operation],
    priced: Sequence[str] = (),
) -> None:
    """Add the cost of every convolution and linear layer, once per call that export does not fold.

    Args:
        builder: Holds dimensions and blocks already.
        calls: `record_calls` at any image size: tells which norm and activation follow a convolution.
        shapes: `record_input_shapes` at deployment.
        blocks: Residual blocks, whose last convolution is fused with the addition.
        engine: Engine it runs in.
        operations: `record_operations` of the same run as ``calls``.
        priced: Paths of modules whose cost is in other terms.
    """
    units = linear_units(builder.model, operations)
    readers: dict[int, list[Call]] = defaultdict(list)
    for call in calls:
        if call.leaf:
            readers[id(call.input)].append(call)
    lasts = {block.conv for block in blocks}
    counts: dict[str, int] = defaultdict(int)
    terms: dict[str, int] = defaultdict(int)
    for call in calls:
        if call.name not in shapes or any(call.name.startswith(f"{path}.") for path in priced):
            continue
        index = counts[call.name]
        counts[call.name] += 1
        shape = shapes[call.name][index]
        unit = units.get((call.name, index), LinearUnit("none", "none", (), False))
        if unit.constant:
            continue
        terms[call.name] += 1
        term = call.name if terms[call.name] == 1 else f"{call.name}#{terms[call.name]}"
        if isinstance(call.module, nn.Conv2d):
            add_conv_term(
                builder,
                call.name,
                call.module,
                shape,
                engine,
                relu=call.name in lasts or _has_relu(call, readers),
                residual=call.name in lasts,
                term=term,
            )
        elif isinstance(call.module, nn.Linear):
            rows = 1
            for count in shape[:-1]:
                rows *= count
            builder.add_term(
                term,
                engine,
                "linear",
                (
                    builder.width_of(f"{call.name}.weight", 1, shape[-1]),
                    builder.width_of(f"{call.name}.weight", 0, call.module.out_features),
                ),
                tokens=rows,
                norm=unit.norm,
                activation=unit.activation,
            )


def _has_relu(call: Call, readers: dict[int, list[Call]]) -> bool:
    """Whether a ReLU alone reads the convolution, or the batch norm behind it."""
    after = readers[id(call.output)]
    if len(after) >= 1 and isinstance(after[0].module, nn.modules.batchnorm._BatchNorm):
        after = readers[id(after[0].output)]
    return any(isinstance(reader.module, (nn.ReLU, nn.ReLU6)) for reader in after)
