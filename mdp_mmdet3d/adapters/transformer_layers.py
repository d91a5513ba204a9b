"""Sub-layers and layers of transformers, found by structure and accepted for what they compute."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mdp_mmdet3d.adapters.network import Shapes
from mdp_mmdet3d.adapters.residual_blocks import equal_outputs
from mdp_mmdet3d.layers import widened
from mdp_mmdet3d.layers.packed_attention import PROJECTION, QKV
from mdp_mmdet3d.space.attention import add_attention
from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.calls import Call
from mdp_mmdet3d.space.mlp import add_hidden
from mdp_mmdet3d.space.types import Block, BlockKind
from mdp_mmdet3d.surgery.masking import silence_block

ACTIVATIONS = {nn.ReLU: "relu", nn.GELU: "gelu"}
PASSIVE = (nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class SubLayer:
    """An attention or feed-forward network that is added to a stream.

    Attributes:
        call: Its recorded call.
        kind: `BlockKind.SUB_LAYER` if it adds its input itself, `BlockKind.BRANCH` if its caller does.
        last: Path within it of the linear layer that closes its branch.
        first: Path of the linear layer that opens it.
        activation: Of a feed-forward network; empty for an attention.
    """

    call: Call
    kind: BlockKind
    last: str
    first: str
    activation: str = ""

    @property
    def name(self) -> str:
        """Its path."""
        return self.call.name


def add_transformer_layers(builder: SpaceBuilder, calls: Sequence[Call], shapes: Shapes, engine: str) -> list[str]:
    """Add blocks, dimensions and terms of all that is understood; the rest is left alone with its reason.

    Args:
        builder: Receives them.
        calls: `record_calls` of the dense model.
        shapes: `record_input_shapes` at deployment.
        engine: Engine it runs in.

    Returns:
        Paths of the sub-layers whose cost is in these terms.
    """
    found = [*_attentions(builder, calls, shapes), *_feed_forwards(builder, calls)]
    layers = list(_layers(calls, found))
    for name in layers:
        builder.add_block(name, BlockKind.LAYER)
    for sub_layer in found:
        parent = next((name for name in layers if sub_layer.name.startswith(f"{name}.")), None)
        builder.add_block(sub_layer.name, sub_layer.kind, parent, last=sub_layer.last)
        rows = shapes[f"{sub_layer.name}.{sub_layer.first}"][0]
        tokens, size = math.prod(rows[:-1]), rows[-1]
        if sub_layer.activation:
            hidden = add_hidden(
                builder,
                f"{sub_layer.name}.{sub_layer.first}",
                (f"{sub_layer.name}.{sub_layer.last}",),
                sub_layer.call.module.get_submodule(sub_layer.first).out_features,
            )
            builder.add_term(
                sub_layer.name,
                engine,
                "ffn",
                (hidden,),
                tokens=tokens,
                embed_dims=size,
                activation=sub_layer.activation,
            )
            continue
        module = sub_layer.call.module
        width = module.qkv.out_features // (3 * module.num_heads)
        packed = tuple(f"{QKV}.{leaf}" for leaf, _ in module.qkv.named_parameters())
        widths = add_attention(
            builder, sub_layer.name, module.num_heads, width, width, packed=packed, out=f"{PROJECTION}.weight"
        )
        builder.add_term(
            sub_layer.name,
            engine,
            "attention",
            widths,
            queries=tokens,
            keys=tokens,
            embed_dims=size,
            shared=True,
            packed=True,
        )
    return [sub_layer.name for sub_layer in found]


def _attentions(builder: SpaceBuilder, calls: Sequence[Call], shapes: Shapes) -> Iterator[SubLayer]:
    for call in calls:
        module = call.module
        qkv, proj, heads = (getattr(module, name, None) for name in (QKV, PROJECTION, "num_heads"))
        if not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear) or not isinstance(heads, int):
            continue
        size = proj.out_features
        kind = _role(call, PROJECTION)
        if (qkv.in_features, qkv.out_features, proj.in_features) != (size, 3 * size, size) or size % heads:
            builder.leave(call.name, "an attention whose projections have other widths than its stream")
        elif shapes.get(f"{call.name}.{QKV}", [(0,)])[0][0] != 1:
            builder.leave(call.name, "an attention within windows has no cost term")
        elif kind is None or not equal_outputs(_run(widened(copy.deepcopy(module)), call.input), call.output):
            builder.leave(call.name, "computes more than a plain self-attention (positions, norms or gates within it)")
        else:
            yield SubLayer(call, kind, PROJECTION, QKV)


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
        between = _chain(inside, first, last)
        kind = _role(call, last.name[len(call.name) + 1 :])
        if kind is None or between is None:
            continue
        seen.append(call.name)
        active = [module for module in between if not isinstance(module, PASSIVE)]
        names = [ACTIVATIONS.get(type(module)) for module in active]
        if len(names) != 1 or names[0] is None or getattr(active[0], "approximate", "none") != "none":
            kinds = ", ".join(type(module).__name__ for module in active) or "nothing"
            builder.leave(call.name, f"a feed-forward network with {kinds} between its layers has no cost term")
            continue
        closing, opening = (c.name[len(call.name) + 1 :] for c in (last, first))
        yield SubLayer(call, kind, closing, opening, names[0])


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
        silent = copy.deepcopy(call.module)
        for sub_layer in within:
            _silence(silent, f"{sub_layer.name}.{sub_layer.last}"[len(call.name) + 1 :])
        if equal_outputs(_run(silent, call.input), call.input):
            yield call.name


def _role(call: Call, last: str) -> BlockKind | None:
    """What the module returns when its branch is 0: its input, or 0; None if neither, or if its input was 0."""
    if not call.input.any():  # as that of DETR's first decoder layer: both would be the same
        return None
    silent = copy.deepcopy(call.module)
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
