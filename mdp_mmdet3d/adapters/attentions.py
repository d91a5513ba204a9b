"""Attentions of a model, found by their projections and accepted for what they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mdp_mmdet3d.adapters.network import Shapes
from mdp_mmdet3d.adapters.residual_blocks import equal_outputs
from mdp_mmdet3d.layers import RemovedSubLayer, widened
from mdp_mmdet3d.layers.attention import (
    has_independent_widths,
    is_deformable,
    separate_projections,
    torch_obstacle,
)
from mdp_mmdet3d.layers.evaluation import evaluating
from mdp_mmdet3d.layers.fused import without_fused_layers
from mdp_mmdet3d.layers.packed_attention import POSITIONS, PROJECTION, QKV, has_positions
from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.types import Block, BlockKind
from mdp_mmdet3d.surgery.apply import shared_copy
from mdp_mmdet3d.surgery.masking import silence_block

MORE = "computes more than a plain attention (positions, norms, gates or masks within it)"


@dataclass(frozen=True)
class FoundAttention:
    """An attention that equals one with independent widths.

    Attributes:
        name: Path.
        block: Path of what goes with its branch, the attention itself or a module around it; empty if nothing can.
        kind: How the block is replaced.
        last: Path within the block of the output projection.
        tensors: `mdp_mmdet3d.space.attention.add_attention`'s keywords that name its tensors.
        heads: Dense number of heads.
        qk: Dense width of a query and a key.
        v: Dense width of a value.
        queries: Tokens at deployment.
        keys: Tokens that are looked at.
        size: Width of the stream.
        shared: Whether the first tokens that are looked at are the queries themselves.
        packed: Whether one layer makes queries, keys and values.
        windows: How many run beside each other; 0 for a deformable attention, whose operators have terms of their own.
    """

    name: str
    block: str
    kind: BlockKind
    last: str
    tensors: Mapping[str, Any]
    heads: int
    qk: int
    v: int
    queries: int
    keys: int
    size: int
    shared: bool
    packed: bool
    windows: int = 1


@dataclass
class _Judged:
    """What the calls of a module have in common."""

    equal: bool = True
    shared: bool = False
    kinds: tuple[BlockKind | None, ...] = ()

    @property
    def kind(self) -> BlockKind | None:
        return self.kinds[0] if len(set(self.kinds)) == 1 else None


def find_attentions(
    builder: SpaceBuilder, model: nn.Module, forward: Callable[[], Any], shapes: Shapes
) -> list[FoundAttention]:
    """All attentions that can be cut; the others are left alone with their reason.

    Args:
        builder: Receives the reasons.
        model: The dense model.
        forward: Runs it on a small input.
        shapes: `record_input_shapes` at deployment.
    """
    candidates: dict[str, str] = {}  # and the path of the output projection
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) or has_independent_widths(module):
            candidates[name] = "out_proj"
        elif isinstance(getattr(module, QKV, None), nn.Linear) and isinstance(
            getattr(module, PROJECTION, None), nn.Linear
        ):
            candidates[name] = PROJECTION
        elif (projections := separate_projections(module)) is not None:
            candidates[name] = projections.out
        elif is_deformable(module):
            candidates[name] = "output_proj"
    judged = _judge(model, forward, candidates)
    found = []
    for name, out in candidates.items():
        attention = _found(model, name, out, judged, shapes)
        if isinstance(attention, str):
            builder.leave(name, attention)
        else:
            found.append(attention)
    cut = {member.tensor for dimension in builder.dimensions.values() for member in dimension.members}
    for name, module in model.named_modules():
        kind = type(module).__name__
        known = [*candidates, *builder.left_alone]
        weights = [f"{name}.{leaf}" for leaf, _ in module.named_parameters()]
        # One whose channels are cut already is a gate of convolutions under that name, such as RTMDet's.
        attends = ("Attention" in kind or "MSA" in kind) and weights and not cut.intersection(weights)
        if attends and not any(f"{name}.".startswith(f"{k}.") or k.startswith(f"{name}.") for k in known if k):
            builder.leave(name, f"is a {kind}, an attention of a structure that is not understood")
    return found


def _found(
    model: nn.Module, name: str, out: str, judged: Mapping[str, _Judged], shapes: Shapes
) -> FoundAttention | str:
    """The attention, or why it is left alone."""
    module = model.get_submodule(name)
    if is_deformable(module):
        if name not in judged:
            return "an attention that does not run when the model is traced"
        block, kind, last = _block(name, out, judged)
        heads = int(module.num_heads)
        size = module.output_proj.out_features
        return FoundAttention(name, block, kind, last, {}, heads, 0, 0, 0, 0, size, False, False, 0)
    packed = hasattr(module, QKV)
    tensors: dict[str, Any]
    if isinstance(module, nn.MultiheadAttention):
        if (obstacle := torch_obstacle(module)) is not None:
            return obstacle
        heads, qk, v = module.num_heads, module.head_dim, module.head_dim
        tensors = {} if module.in_proj_bias is not None else {"packed": ("in_proj_weight",)}
        # (tokens, batch, C) unless the batch comes first
        order = (0, 1) if module.batch_first else (1, 0)
        inputs = [tuple(s[i] for i in (*order, 2)) for s in (*shapes.get(name, ()), *shapes.get(f"{name}.key", ()))]
    elif has_independent_widths(module):
        heads, qk, v = module.num_heads, module.qk_head_dim, module.v_head_dim
        tensors = {}
        inputs = [*shapes.get(name, ()), *shapes.get(f"{name}.key", ())]
    else:
        inputs, widths = _linear_inputs(module, name, shapes)
        if widths is None:
            return "an attention whose projections have other widths than its stream"
        heads, qk, v = widths
        tensors = _tensors(module)
    if name not in judged or len(inputs) < 2:
        return "an attention that does not run when the model is traced"
    if len(inputs) > 2:
        return "an attention that runs more than once per frame"
    (batch, queries, size), (_, keys, key_size) = inputs
    if batch != 1 and not packed:
        return "an attention on several images at once has no cost term"
    if size != key_size or model.get_submodule(f"{name}.{out}").out_features != size:
        return "an attention whose projections have other widths than its stream"
    if not judged[name].equal:
        return MORE
    block, kind, last = _block(name, out, judged)
    shared = queries == keys or judged[name].shared
    return FoundAttention(name, block, kind, last, tensors, heads, qk, v, queries, keys, size, shared, packed, batch)


def _block(name: str, out: str, judged: Mapping[str, _Judged]) -> tuple[str, BlockKind, str]:
    """What goes with an attention, itself or the module around it; how it is replaced; path of its end within it."""
    around = name.rpartition(".")[0]
    if around in judged and judged[around].kind is not None:
        return around, judged[around].kind or BlockKind.BRANCH, f"{name[len(around) + 1 :]}.{out}"
    return (name if judged[name].kind else ""), judged[name].kind or BlockKind.BRANCH, out


def _linear_inputs(
    module: nn.Module, name: str, shapes: Shapes
) -> tuple[list[tuple[int, ...]], tuple[int, int, int] | None]:
    """Shapes (B, T, C) of what queries and keys are made of, and heads, q/k and v width."""
    if hasattr(module, QKV):
        heads, size = getattr(module, "num_heads", 0), module.proj.out_features
        whole = (module.qkv.in_features, module.qkv.out_features, module.proj.in_features) == (size, 3 * size, size)
        plain = whole and isinstance(heads, int) and heads and not size % heads
        return 2 * _three(shapes.get(f"{name}.{QKV}")), (heads, size // heads, size // heads) if plain else None
    found = separate_projections(module)
    if found is None:
        return [], None
    return [s for part in found.inputs[:2] for s in _three(shapes.get(f"{name}.{part}"))], (
        found.heads,
        found.qk,
        found.v,
    )


def _three(found: Sequence[tuple[int, ...]] | None) -> list[tuple[int, ...]]:
    return [shape if len(shape) == 3 else (0, 0, 0) for shape in found or ()]


def _tensors(module: nn.Module) -> dict[str, Any]:
    def leaves(path: str) -> tuple[str, ...]:
        return tuple(f"{path}.{leaf}" for leaf, _ in module.get_submodule(path).named_parameters(recurse=False))

    if hasattr(module, QKV):
        bias = POSITIONS if has_positions(module) else ""
        return {"packed": leaves(QKV), "out": f"{PROJECTION}.weight", "bias": bias}
    found = separate_projections(module)
    assert found is not None
    return {"separate": tuple(leaves(part) for part in found.inputs), "out": f"{found.out}.weight"}


def _judge(model: nn.Module, forward: Callable[[], Any], candidates: Mapping[str, str]) -> dict[str, _Judged]:
    """Run the model once, and compare every candidate's calls; modules around one are judged without its branch."""
    names = dict(candidates)
    for name, out in candidates.items():
        around, _, leaf = name.rpartition(".")
        if around and around not in names:
            names[around] = f"{leaf}.{out}"
    judged: dict[str, _Judged] = {}
    busy = False

    def note(name: str) -> Callable[..., None]:
        def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal busy
            if busy:
                return
            busy = True
            try:
                result = judged.setdefault(name, _Judged())
                if has_independent_widths(module):
                    queries, keys, *_ = (*args, *(kwargs[key] for key in ("query", "key") if key in kwargs))
                    result.shared = _begins_with(keys, queries)
                elif name in candidates and not is_deformable(module):
                    result.equal &= _equal(module, args, kwargs, output)
                result.kinds += (_role(module, args, kwargs, names[name]),)
            finally:
                busy = False

        return compare

    handles = [model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True) for name in names if name]
    try:
        with evaluating(model), without_fused_layers(), torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return judged


def _begins_with(keys: Tensor, queries: Tensor) -> bool:
    """Whether the first tokens of (B, S, C) are those of (B, T, C)."""
    return bool(queries.any()) and torch.equal(keys[:, : queries.shape[1]], queries)


def _equal(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> bool:
    """Whether an attention returned what one with independent widths does."""
    try:
        if equal_outputs(_first(widened(module)(*args, **kwargs)), _first(output)):
            return True
        # Large values round differently in float32 where nothing else differs.
        exact = copy.deepcopy(module).double()
        for part in exact.modules():
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
        inputs, named = [_double(value) for value in args], {key: _double(value) for key, value in kwargs.items()}
        return equal_outputs(_first(widened(exact)(*inputs, **named)), _first(exact(*inputs, **named)))
    except Exception:  # masks, other inputs, other widths: whatever it is, it is not understood
        return False


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _role(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], last: str) -> BlockKind | None:
    """What a module returns when its branch is 0, on random inputs: what it adds to, or 0; None if neither."""
    silent = shared_copy(module)
    for part in silent.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    values: dict[int, Tensor] = {}

    def random(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        generator = torch.Generator().manual_seed(len(values))
        return values.setdefault(id(value), torch.randn(value.shape, generator=generator).to(value))

    inputs, named = tuple(map(random, args)), {key: random(value) for key, value in kwargs.items()}
    try:
        silence_block(silent, Block("", BlockKind.SUB_LAYER, last=last))
        stays = RemovedSubLayer()(*inputs, **named).clone()
        found = _first(silent(*inputs, **named))
    except Exception:  # whatever a foreign module raises, it is not understood
        return None
    if equal_outputs(found, stays):
        return BlockKind.SUB_LAYER
    return BlockKind.BRANCH if isinstance(found, Tensor) and not found.any() else None


def _first(value: Any) -> Any:
    """The output without attention weights."""
    return value[0] if isinstance(value, tuple) and value else value
