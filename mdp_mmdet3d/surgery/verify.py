"""Every dimension and block by itself: the pruned model must equal the masked dense one, or it is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan

TOLERANCE = 1e-4
"""Largest difference relative to the output's largest value: float32 sums in another order stay below a tenth of it."""

Forward = Callable[[nn.Module], Sequence[Tensor]]


def verify_space(space: PruningSpace, model: nn.Module, forward: Forward) -> dict[str, str]:
    """Cut every dimension to its smallest count, and remove every block, one by one.

    Args:
        space: Traced from ``model``.
        model: The dense model; not changed.
        forward: Runs a model on a fixed small input; returns its outputs.

    Returns:
        Names of dimensions and blocks that cannot be cut, with the reason: the pruned model fails, its outputs have
        other shapes than the dense model's, or other values than the masked dense model's.
    """
    dense = [output.shape for output in _outputs(model, forward)]
    failures = {}
    for name, widths, removed in _single_changes(space):
        if (reason := _difference(space, model, forward, dense, widths, removed)) is not None:
            failures[name] = f"verification failed: {reason}"
    return failures


def verify_together(space: PruningSpace, model: nn.Module, forward: Forward) -> str | None:
    """Everything at its smallest at once: None if right, else what is wrong."""
    dense = [output.shape for output in _outputs(model, forward)]
    smallest = {d.name: d.options[0] for d in space.dimensions}
    return _difference(space, model, forward, dense, smallest, ())


def is_constant(model: nn.Module, forwards: Sequence[Forward]) -> bool:
    """Whether the outputs of a model are the same for each of ``forwards``, which run it on different inputs."""
    first, *others = [_outputs(model, forward) for forward in forwards]
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def _single_changes(space: PruningSpace) -> Iterator[tuple[str, dict[str, int], tuple[str, ...]]]:
    for dimension in space.dimensions:
        yield dimension.name, {dimension.name: dimension.options[0]}, ()
    for block in space.blocks:
        yield block.name, {}, (block.name,)


def _difference(
    space: PruningSpace,
    model: nn.Module,
    forward: Forward,
    dense: Sequence[torch.Size],
    widths: dict[str, int],
    removed: Collection[str],
) -> str | None:
    kept = {}
    for d in space.dimensions:
        count = widths.get(d.name, d.size)
        kept[d.name] = (tuple(range(d.size - count, d.size)),) * d.copies  # not the first: an offset must show
    plan = PruningPlan.from_kept(space, kept, frozenset(removed))
    try:
        pruned = _outputs(apply_plan(copy.deepcopy(model), plan), forward)
        masked = _outputs(mask_model(copy.deepcopy(model), plan), forward)
    except Exception as error:  # whatever a model raises with another width, it cannot be cut there
        message = str(error).strip().split("\n")[0]
        return f"{type(error).__name__}: {message}"
    for shape, ours, theirs in zip(dense, pruned, masked, strict=True):
        if ours.shape != shape:
            return f"an output has shape {tuple(ours.shape)} instead of {tuple(shape)}"
        scale = float(theirs.abs().max())
        gap = float((ours - theirs).abs().max())
        if not gap <= TOLERANCE * max(scale, 1e-12):
            return f"outputs differ from the masked dense model by {gap:.1e} of {scale:.1e}"
    return None


def _outputs(model: nn.Module, forward: Forward) -> list[Tensor]:
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            return [output.clone() for output in forward(model)]
    finally:
        for module, mode in modes.items():
            module.training = mode
