"""Measure the loss change of every block and of several widths of every dimension, until their ranking is stable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from rich import get_console
from rich.progress import Progress, TimeRemainingColumn

from mdp_mmdet3d.importance.loss_probe import LossProbe
from mdp_mmdet3d.importance.values import LossChange, LossChanges
from mdp_mmdet3d.progress import PlainProgress
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.plan import PruningPlan

STABLE, STABLE_BLOCKS = 0.97, 0.9
"""Rank correlation with another measurement, of all cuts and of blocks, at which no more frames are taken."""


LEAST_RANKED = 8  # fewer blocks have no rank correlation to speak of
Key = TypeVar("Key")


def measured_counts(options: Sequence[int], widths: int) -> tuple[int, ...]:
    """Options to measure: the smallest and others, evenly spread between it and the dense count."""
    below = len(options) - 1
    number = min(widths, below)
    return tuple(options[round(i * below / number)] for i in range(number))


def single_cuts(
    space: PruningSpace, order: Mapping[str, np.ndarray], widths: int
) -> dict[tuple[str, int | None], PruningPlan]:
    """The plan of every single cut, by block (and None) or dimension and count.

    Args:
        space: What may be pruned.
        order: Per dimension, element indices by falling importance, (copies, size).
        widths: Counts per dimension to measure, at most.
    """
    cuts: dict[tuple[str, int | None], PruningPlan] = {}
    for block in space.blocks:
        removed = frozenset(b.name for b in space.blocks if block.name in space.chain(b.name))
        cuts[block.name, None] = PruningPlan.from_kept(space, {}, removed)
    for dimension in space.dimensions:
        for count in measured_counts(dimension.options, widths):
            best = order[dimension.name][:, :count]
            kept = {dimension.name: tuple(tuple(sorted(int(e) for e in copy)) for copy in best)}
            cuts[dimension.name, count] = PruningPlan.from_kept(space, kept, frozenset())
    return cuts


def measure_loss_changes(
    probe: LossProbe,
    space: PruningSpace,
    order: Mapping[str, np.ndarray],
    *,
    widths: int,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> LossChanges:
    """Loss changes of all single cuts; another round of frames follows while their ranking is not stable.

    What `probe` knows already is not measured again, so that an interrupted run goes on.

    Args:
        probe: Measures.
        space: What may be pruned.
        order: As for `single_cuts`.
        widths: As for `single_cuts`.
        progress: Show a progress bar, or a line now and then where there is no terminal.
        say: Receives what was found.

    Raises:
        MdpError: A cut makes the loss infinite or undefined.
    """
    cuts = single_cuts(space, order, widths)
    if known := sum(probe.measured(plan) for plan in cuts.values()):
        say(f"reused: {known} of {len(cuts)} cuts")
    while True:
        found = measure_plans(probe, cuts, "loss changes", progress)
        reliability = split_reliability(np.array(list(found.values())), probe.pieces)
        removals = np.array([changes for (_, count), changes in found.items() if count is None])
        stable = reliability >= STABLE and (
            len(removals) < LEAST_RANKED or split_reliability(removals, probe.pieces) >= STABLE_BLOCKS
        )
        if stable or not probe.more_frames():
            break
        say(f"ranking of {len(cuts)} cuts over {probe.frames} frames not stable yet ({reliability:.3f}): more frames")
    say(
        f"{len(cuts)} cuts over {probe.frames} frames, dense loss {probe.dense_loss:.3f}; "
        f"expected rank correlation with another measurement {reliability:.3f}"
        + ("" if stable else ": there are no more frames (prune.importance max_frames)")
    )
    blocks: dict[str, LossChange] = {}
    counts: dict[str, dict[int, LossChange]] = {dimension.name: {} for dimension in space.dimensions}
    for (name, count), changes in found.items():
        if count is None:
            blocks[name] = LossChange.of(changes, probe.pieces)
        else:
            counts[name][count] = LossChange.of(changes, probe.pieces)
    return LossChanges(blocks, counts, probe.dense_loss, probe.frames, reliability)


def measure_plans(
    probe: LossProbe, plans: Mapping[Key, PruningPlan], title: str, progress: bool = True
) -> dict[Key, np.ndarray]:
    """Loss change per frame of every plan; a progress bar for those that are not known yet."""
    found = {key: probe.change(plan) for key, plan in plans.items() if probe.measured(plan)}
    disable = not (progress and get_console().is_terminal)  # a finished bar would stay as a line of a log
    with Progress(*Progress.get_default_columns()[:-1], TimeRemainingColumn(), disable=disable) as bar:
        task = bar.add_task(title, total=len(plans), completed=len(found))
        plain = PlainProgress(bar.console, title, len(plans), "cuts", len(found))
        for key, plan in plans.items():
            if key in found:
                continue
            found[key] = probe.change(plan)
            bar.update(task, advance=1)
            if progress:
                plain(len(found))
    return {key: found[key] for key in plans}


def split_reliability(changes: np.ndarray, pieces: np.ndarray) -> float:
    """Rank correlation to be expected between two measurements over as many frames (Spearman-Brown).

    Args:
        changes: (cuts, frames) loss changes.
        pieces: (frames,) piece of a stream that a frame is of; frames of one piece are alike.
    """
    odd = pieces % 2 == 1
    if not odd.any() or len(changes) < 3:
        odd = np.arange(len(pieces)) % 2 == 1
    halves = spearman(changes[:, odd].mean(axis=1), changes[:, ~odd].mean(axis=1))
    return 2 * halves / (1 + halves) if halves > 0 else 0.0


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ties at their mean rank; 1 where either does not vary."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (a, b)]
    spread = [values.std() for values in ranks]
    if min(spread) == 0:
        return 1.0
    return float(np.mean((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())) / (spread[0] * spread[1]))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
