"""Sub-layers and layers of transformers, found by structure and accepted for what they compute."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mdp_mmdet3d.adapters.attentions import FoundAttention
from mdp_mmdet3d.adapters.network import Shapes
from mdp_mmdet3d.adapters.residual_blocks import equal_outputs
from mdp_mmdet3d.space.attention import add_attention, add_deformable_attention
from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.calls import Call
from mdp_mmdet3d.space.flow import follow_channels
from mdp_mmdet3d.space.mlp import add_hidden
from mdp_mmdet3d.space.streams import add_embed_widths
from mdp_mmdet3d.space.types import Block, BlockKind, Width
from mdp_mmdet3d.surgery.apply import shared_copy
from mdp_mmdet3d.surgery.masking import silence_block

ACTIVATIONS = {nn.ReLU: "relu", nn.GELU: "gelu"}
PASSIVE = (nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class SubLayer:
    """An attention or feed-forward network that is added to a stream.

    Attributes:
        name: Its path.
        kind: `BlockKind.SUB_LAYER` if it adds its input itself, `BlockKind.BRANCH` if its caller does.
        last: Path within it of the linear layer that closes its branch.
        first: Path of the linear layer that opens a feed-forward network; empty for an attention.
        activation: Of a feed-forward network; empty for an attention.
        size: Hidden width of a feed-forward network.
    """

    name: str
    kind: BlockKind
    last: str
    first: str = ""
    activation: str = ""
    size: int = 0


def add_transformer_layers(
    builder: SpaceBuilder,
    calls: Sequence[Call],
    attentions: Sequence[FoundAttention],
    shapes: Shapes,
    engine: str,
    forward: Callable[[], Any] | None = None,
) -> list[str]:
    """Add blocks, dimensions and terms of all that is understood; the rest is left alone with its reason.

    Layers that are blocks already, sub-layers that are left alone, and hidden widths that are dimensions or left alone
    stay what they are.

    Args:
        builder: Receives them.
        calls: `record_calls` of the dense model.
        attentions: `find_attentions` of it.
        shapes: `record_input_shapes` at deployment.
        engine: Engine it runs in.
        forward: Runs the model on a small input, where its embedding widths are wanted too.

    Returns:
        Paths of the sub-layers whose cost is in these terms.
    """
    feed_forwards = list(_feed_forwards(builder, calls))
    found = [*(SubLayer(a.block, a.kind, a.last) for a in attentions if a.block), *feed_forwards]
    layers = [block.name for block in builder.blocks.values() if block.kind is BlockKind.LAYER]
    for name in _layers(calls, found):
        if name not in layers:
            builder.add_block(name, BlockKind.LAYER)
            layers.append(name)
    for sub_layer in found:
        if sub_layer.name in builder.left_alone:
            continue
        parent = next((name for name in layers if sub_layer.name.startswith(f"{name}.")), None)
        builder.add_block(sub_layer.name, sub_layer.kind, parent, last=sub_layer.last)
    widths: dict[str, tuple[Width, ...]] = {}
    for attention in attentions:
        if attention.windows:
            widths[attention.name] = add_attention(
                builder, attention.name, attention.heads, attention.qk, attention.v, **attention.tensors
            )
        else:
            add_deformable_attention(builder, attention.name, attention.heads)
    for sub_layer in feed_forwards:
        first, last = (f"{sub_layer.name}.{leaf}" for leaf in (sub_layer.first, sub_layer.last))
        widths[sub_layer.name] = (add_hidden(builder, first, (last,), sub_layer.size),)
    known = tuple(f"{name}." for name in widths)
    for first_call, consumers in _hidden_chains(calls):
        if not first_call.name.startswith(known) and not _has_hidden(builder, first_call.name):
            add_hidden(builder, first_call.name, consumers, first_call.module.out_features)
    if forward is not None:
        readers = {attention.name: _readers(attention) for attention in attentions}
        ties = [(names[0], name) for names in readers.values() for name in names[1:]]  # one width for q, k and v
        flow = follow_channels(builder.model, forward, ties)
        places = [place for names in readers.values() for place in names]
        add_embed_widths(builder, flow, [*places, *((f"{s.name}.{s.first}.weight", 1) for s in feed_forwards)])
    for attention in (a for a in attentions if a.windows):
        attributes: dict[str, Any] = {
            "queries": attention.queries,
            "keys": attention.keys,
            "shared": attention.shared,
            "packed": attention.packed,
            "windows": attention.windows,
        }
        stream = builder.width_of(*_readers(attention)[0], attention.size)
        _add_sub_layer(builder, attention.name, engine, "attention", widths[attention.name], stream, attributes)
    for sub_layer in feed_forwards:
        first = f"{sub_layer.name}.{sub_layer.first}"
        rows = shapes[first][0]
        attributes = {"tokens": math.prod(rows[:-1]), "activation": sub_layer.activation}
        stream = builder.width_of(f"{first}.weight", 1, rows[-1])
        _add_sub_layer(builder, sub_layer.name, engine, "ffn", widths[sub_layer.name], stream, attributes)
    return [
        *(attention.name for attention in attentions if attention.windows),
        *(sub_layer.name for sub_layer in feed_forwards),
    ]


def _readers(attention: FoundAttention) -> list[tuple[str, int]]:
    """Weights of an attention whose columns read the stream, with that axis."""
    if not attention.windows:
        leaves = [f"{part}.weight" for part in ("value_proj", "sampling_offsets", "attention_weights")]
    elif "separate" in attention.tensors:
        leaves = [names[0] for names in attention.tensors["separate"]]
    else:
        leaves = [attention.tensors.get("packed", ("in_proj_weight",))[0]]
    return [(f"{attention.name}.{leaf}", 1) for leaf in leaves]


def _add_sub_layer(
    builder: SpaceBuilder,
    name: str,
    engine: str,
    kind: str,
    widths: tuple[Width, ...],
    stream: Width,
    attributes: dict[str, Any],
) -> None:
    """Add the cost of a sub-layer on a stream, whose width is a number or to be chosen."""
    if isinstance(stream, int):
        builder.add_term(name, engine, kind, widths, embed_dims=stream, **attributes)
    else:
        builder.add_term(name, engine, f"stream_{kind}", (*widths, stream), **attributes)


def _feed_forwards(builder: SpaceBuilder, calls: Sequence[Call]) -> Iterator[SubLayer]:
    seen: list[str] = []
    for call in calls:
        if call.leaf or any(call.name.startswith(f"{name}.") for name in seen):
            continue
        inside = [c for c in calls if call.first < c.first and c.last < call.last and c.leaf]
        linears = [c for c in inside if isinstance(c.module, nn.Linear)]
        if len(linears) != 2 or call.input.shape[-1] != linears[0].module.in_features:
            continue
        first, last = linears
        if _has_hidden(builder, first.name):
            continue
        between = _chain(inside, first, last)
        kind = _role(call, last.name[len(call.name) + 1 :])
        if kind is None or between is None:
            continue
        seen.append(call.name)
        active = [module for module in between if not isinstance(module, PASSIVE)]
        names = [ACTIVATIONS.get(type(module)) for module in active]
        if len(names) != 1 or names[0] is None or getattr(active[0], "approximate", "none") != "none":
            builder.add_block(call.name, kind, last=last.name[len(call.name) + 1 :])  # its parts have terms
            continue
        closing, opening = (c.name[len(call.name) + 1 :] for c in (last, first))
        yield SubLayer(call.name, kind, closing, opening, names[0], first.module.out_features)


def _has_hidden(builder: SpaceBuilder, first: str) -> bool:
    """Whether the width behind the linear layer ``first`` is a dimension or left alone."""
    return f"{first}.out" in builder.dimensions or f"{first}.out" in builder.left_alone


def _hidden_chains(calls: Sequence[Call]) -> Iterator[tuple[Call, tuple[str, ...]]]:
    """Linear layers, and those that read nothing but them, through modules without parameters."""
    leaves = [call for call in calls if call.leaf]
    linears = [call for call in leaves if isinstance(call.module, nn.Linear)]
    count = Counter(call.name for call in linears)
    for first, last in pairwise(linears):
        if count[first.name] == count[last.name] == 1 and first.module.out_features == last.module.in_features:
            between = _chain(leaves, first, last)
            readers = tuple(call.name for call in linears if call.input is last.input)
            bare = between is not None and not any(list(module.parameters()) for module in between)
            if bare and all(count[name] == 1 for name in readers):
                yield first, readers


def _chain(inside: Sequence[Call], first: Call, last: Call) -> list[nn.Module] | None:
    """Modules through which alone the output of ``first`` becomes the input of ``last``, or None."""
    value, position = first.output, first.last
    between: list[nn.Module] = []
    while True:
        readers = [c for c in inside if c.input is value and position < c.first < last.first]
        if value is last.input:
            readers = [c for c in readers if c.output is value]  # in place: the same tensor before and after
            if not readers:
                return between
        if not readers or isinstance(readers[0].module, nn.Linear):
            return None
        value, position = readers[0].output, readers[0].last
        between.append(readers[0].module)


def _layers(calls: Sequence[Call], found: Sequence[SubLayer]) -> Iterator[str]:
    """Modules that return their input once all their sub-layers add nothing."""
    for call in calls:
        within = [s for s in found if s.name.startswith(f"{call.name}.")]
        if call.leaf or {bool(s.activation) for s in within} != {True, False}:
            continue
        if isinstance(call.module, (nn.Sequential, nn.ModuleList)) or len(within) != 2:
            continue
        silent = shared_copy(call.module)
        for sub_layer in within:
            _silence(silent, f"{sub_layer.name}.{sub_layer.last}"[len(call.name) + 1 :])
        if equal_outputs(_run(silent, call.input), call.input):
            yield call.name


def _role(call: Call, last: str) -> BlockKind | None:
    """What the module returns when its branch is 0: its input, or 0; None if neither, or if its input was 0."""
    if not call.input.any():  # as that of DETR's first decoder layer: both would be the same
        return None
    silent = shared_copy(call.module)
    _silence(silent, last)
    found = _run(silent, call.input)
    if found is None:
        return None
    if equal_outputs(found, call.input):
        return BlockKind.SUB_LAYER
    return BlockKind.BRANCH if found.shape == call.input.shape and not found.any() else None


def _silence(module: nn.Module, last: str) -> None:
    with torch.no_grad():
        silence_block(module, Block("", BlockKind.SUB_LAYER, last=last))


def _run(module: nn.Module, x: Tensor) -> Tensor | None:
    for part in module.modules():
        part.training = False
    try:
        with torch.no_grad():
            found = module(x.clone())
    except Exception:  # whatever a foreign module raises on an input alone, it is not understood
        return None
    return found if isinstance(found, Tensor) else None
