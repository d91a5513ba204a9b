"""The pruned model must equal the masked dense one; a dimension or block with which it does not is left alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mdp_mmdet3d.layers.evaluation import evaluating
from mdp_mmdet3d.layers.fused import without_fused_layers
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.apply import apply_plan, shared_copy
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan

TOLERANCE = 1e-4
"""Largest difference relative to the output's largest value: float32 sums in another order stay below a tenth of it."""

PLANS = 8
"""Random plans that are tried, at least; even."""

Forward = Callable[[nn.Module], Sequence[Tensor]]


def verify_space(space: PruningSpace, model: nn.Module, forward: Forward) -> dict[str, str]:
    """Cut half of the dimensions to their smallest count and remove a share of the blocks, in several random plans.

    A plan that is wrong is halved until the dimensions and blocks are found with which alone it is.

    Args:
        space: Traced from ``model``.
        model: The dense model; not changed.
        forward: Runs a model on a fixed small input; returns its outputs.

    Returns:
        Names of dimensions and blocks that cannot be cut, with the reason: the pruned model fails, its outputs have
        other shapes than the dense model's, or other values than the masked dense model's. What is wrong only together
        is not among them (`verify_together`).
    """
    failures: dict[str, str] = {}

    def reason(changes: Sequence[str]) -> str | None:
        widths = {name: space.by_name[name].options[0] for name in changes if name in space.by_name}
        removed = [name for name in changes if name in space.blocks_by_name and name not in widths]
        return _difference(space, model, forward, widths, removed)

    def search(changes: Sequence[str], why: str) -> None:
        if len(changes) == 1:
            failures[changes[0]] = f"verification failed: {why}"
            return
        for half in (changes[: len(changes) // 2], changes[len(changes) // 2 :]):
            if (found := reason(half)) is not None:
                search(half, found)

    for plan in _random_changes(space):
        while changes := [name for name in plan if name not in failures]:
            known = len(failures)
            if (why := reason(changes)) is not None:
                search(changes, why)
            if len(failures) == known:  # right, or wrong only together
                break
    return failures


def verify_together(space: PruningSpace, model: nn.Module, forward: Forward) -> str | None:
    """Everything at its smallest at once: None if right, else what is wrong."""
    smallest = {d.name: d.options[0] for d in space.dimensions}
    return _difference(space, model, forward, smallest, ())


def is_constant(model: nn.Module, forwards: Sequence[Forward]) -> bool:
    """Whether the outputs of a model are the same for each of ``forwards``, which run it on different inputs."""
    first, *others = [_outputs(model, forward) for forward in forwards]
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def _random_changes(space: PruningSpace) -> Iterator[list[str]]:
    """Dimensions that are narrow and blocks that are gone: each dimension in half of the plans, each block in one.

    Of any two dimensions one is narrow without the other in some plan: what fits only while both are equally wide, as
    the halves of a split, must show. Blocks within others go in the second half of the plans, where those others stay.
    """
    count = len(space.dimensions)
    bits = max(count - 1, 0).bit_length()
    half = max(PLANS // 2, bits)
    coins = np.random.default_rng(0).integers(0, 2, (half, count))
    coins[:bits] = np.arange(count) >> np.arange(bits)[:, None] & 1  # no two dimensions have the same
    outer = [block.name for block in space.blocks if block.parent is None]
    inner = [block.name for block in space.blocks if block.parent is not None]
    for index in range(2 * half):
        side = coins[index % half] == index // half
        blocks = (outer if index < half else inner)[index % half :: half]
        yield [*(d.name for d, narrow in zip(space.dimensions, side) if narrow), *blocks]


def _difference(
    space: PruningSpace,
    model: nn.Module,
    forward: Forward,
    widths: dict[str, int],
    removed: Collection[str],
) -> str | None:
    kept = {}
    for d in space.dimensions:
        count = widths.get(d.name, d.size)
        kept[d.name] = (tuple(range(d.size - count, d.size)),) * d.copies  # not the first: an offset must show
    plan = PruningPlan.from_kept(space, kept, frozenset(removed))
    try:
        pruned = _outputs(apply_plan(shared_copy(model), plan), forward)
        masked = _outputs(mask_model(shared_copy(model), plan), forward)
    except Exception as error:  # whatever a model raises with another width, it cannot be cut there
        message = str(error).strip().split("\n")[0]
        return f"{type(error).__name__}: {message}"
    for ours, theirs in zip(pruned, masked, strict=True):
        if ours.shape != theirs.shape:
            return f"an output has shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
        scale = float(theirs.abs().max())
        gap = float((ours - theirs).abs().max())
        if not gap <= TOLERANCE * max(scale, 1e-12):
            return f"outputs differ from the masked dense model by {gap:.1e} of {scale:.1e}"
    return None


def _outputs(model: nn.Module, forward: Forward) -> list[Tensor]:
    # torch's fused layers read the weights of their norms, which masking replaces as modules.
    with evaluating(model), torch.no_grad(), without_fused_layers():
        return [output.clone() for output in forward(model)]
