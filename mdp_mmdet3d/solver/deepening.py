"""Label search with a target that moves from the bound downwards until the optimum is met."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from mdp_mmdet3d.solver.elimination import Elimination, balanced
from mdp_mmdet3d.solver.labels import RESOLUTION, CompletionBound, LabelSearch, OutOfRoomError, SearchOutcome
from mdp_mmdet3d.solver.lagrangian import Dual
from mdp_mmdet3d.solver.packing import Packing
from mdp_mmdet3d.solver.problem import ProblemStructure
from mdp_mmdet3d.solver.scaling import ScaledProblem, power_of_two

_ROOMS = (100_000, 600_000, 3_000_000)
_FAILURES_PER_ROOM, _BEAM_SHARE, _BEAM_WIDTHS = 3, 20, (6, 20, None)
_FIRST_STEP, _GROWTH = 1 / 32, ((1_000, 4.0), (30_000, 2.0), (_ROOMS[-1], 1.5))
_SPREAD, _SPREAD_OF_MANY = (0.97, 1.03, 0.9, 1.1, 0.7, 1.5), (0.9, 1.1, 0.7, 1.4)
_ROUNDING = 1e-9


@dataclass
class Progress:
    """What is known about the optimum, in scaled units.

    Attributes:
        lower: Value of `plan` without what every plan is worth; -inf without one.
        upper: No plan is worth more.
        plan: Best plan known.
        exact: The plan is the optimum, ties decided.
        labels: Largest number of labels in one join.
        rounds: Number of searches.
    """

    lower: float
    upper: float
    plan: ProblemStructure | None
    exact: bool = False
    labels: int = 0
    rounds: int = 0

    def closed(self, gap: float) -> bool:
        """Whether bound and plan are within a relative gap."""
        return self.plan is not None and self.upper - self.lower <= gap * abs(self.lower)


def surviving(dual: Dual, limits: np.ndarray, target: float) -> list[np.ndarray]:
    """Per variable, which states a plan worth at least ``target`` may use, by their max-marginals."""
    floor = target - float(dual.multipliers @ limits) - 1e-11 * (1.0 + dual.multipliers.sum())
    return [best >= floor for best in dual.sweep.state_marginals]


def deepen(
    scaled: ScaledProblem,
    dual: Dual,
    progress: Progress,
    *,
    gap: float,
    reduce: bool,
    deadline: float,
    floor: float = 0.0,
) -> None:
    """Improve ``progress`` until it is exact, the deadline passes or there is no room for more labels.

    A search with a target between bound and optimum comes out empty, cheaply, and lowers the bound; the first one
    below the optimum finds it. Where labels do not fit, a beam search improves the incumbent, the next target lies
    between this one and the bound, and after some failures there is more room.

    Args:
        scaled: The problem.
        dual: Its Lagrangian bound.
        progress: Changed in place.
        gap: Relative gap that is good enough once an exact search has run out of room.
        reduce: Remove states by max-marginals before each search.
        deadline: `time.perf_counter` at which to stop.
        floor: Value below which plans are of no interest, >= 0; without a plan that reaches it, none is left.
    """
    top = progress.upper
    step = (top - max(progress.lower, floor)) * _FIRST_STEP if progress.plan else 1e-3 * top
    step = max(step, 1e-7 * top)
    room, failures = _ROOMS[0], 0
    while not progress.exact and time.perf_counter() < deadline:
        target = max(progress.lower, top - step, floor)
        search = _Round(scaled, dual, target, reduce, deadline)
        outcome = search.run(room, beam=False)
        progress.rounds += 1
        if outcome is None:
            _improve(scaled, dual, progress, room // _BEAM_SHARE, gap, deadline, floor)
            failures += 1
            level = failures // _FAILURES_PER_ROOM
            if progress.closed(gap) or level >= len(_ROOMS):
                return
            room = _ROOMS[level]
            step = (step + top - progress.upper) / 2
            continue
        progress.labels = max(progress.labels, outcome.labels)
        search.record(outcome, progress, complete=True)
        if progress.plan is not None and progress.lower >= target - _ROUNDING:
            progress.upper, progress.exact = progress.lower, True
        elif target == floor:
            progress.plan, progress.lower = None, -np.inf
            progress.upper, progress.exact = -np.inf, True
        else:
            progress.upper = min(progress.upper, target)
            growth = next(factor for count, factor in _GROWTH if outcome.labels <= count)
            step = max(step, top - progress.upper) * (growth if len(scaled.limits) == 1 else growth**0.5)


def _improve(
    scaled: ScaledProblem, dual: Dual, progress: Progress, room: int, gap: float, deadline: float, floor: float
) -> None:
    """Beam searches for a better plan, on a few states of each variable first."""
    for width in _BEAM_WIDTHS:
        search = _Round(scaled, dual, max(progress.lower, floor), True, deadline, width)
        outcome = search.run(room, beam=True)
        if outcome is not None:
            search.record(outcome, progress, complete=False)
        if progress.closed(gap) or time.perf_counter() > deadline:
            return


class _Round:
    """One reduced graph with its completion bounds."""

    def __init__(
        self, scaled: ScaledProblem, dual: Dual, target: float, reduce: bool, deadline: float, width: int | None = None
    ) -> None:
        self.target = target
        self._limits = scaled.limits
        self._deadline = deadline
        self._largest_value = power_of_two(dual.bound) if dual.bound > 0 else 1.0
        self._tree: Elimination | None = None
        self._packing: Packing | None = None
        graph = scaled.graph
        if reduce:
            keep = surviving(dual, scaled.limits, target)
            if not all(mask.any() for mask in keep):
                return
            graph = graph.restrict(keep if width is None else [_spread(mask, width) for mask in keep])
        tree = balanced(graph)
        self._tree = tree
        self._packing = Packing(graph)
        self._bounds = [
            CompletionBound(weight, multipliers, tree.sweep_weighted(weight, multipliers))
            for weight, multipliers in _functions(dual.multipliers)
        ]

    def run(self, room: int, *, beam: bool) -> SearchOutcome | None:
        """Search; None where there is no room or no time."""
        if self._tree is None or self._packing is None:
            return SearchOutcome(None, True, 0)
        search = LabelSearch(
            self._tree,
            self._packing,
            self._limits,
            self._bounds,
            self._largest_value,
            self.target,
            room,
            beam,
            self._deadline,
        )
        try:
            return search.run()
        except OutOfRoomError:
            return None

    def record(self, outcome: SearchOutcome, progress: Progress, *, complete: bool) -> None:
        """Take over the outcome's plan if it is better or, after a complete search, as good."""
        if outcome.row is None or self._packing is None:
            return
        value = float(outcome.row[0]) * self._largest_value / RESOLUTION
        if value > progress.lower + (-_ROUNDING if complete else 1e-12):
            words = outcome.row[1 + len(self._limits) :]
            progress.plan, progress.lower = self._packing.unpack(words), value


def _spread(mask: np.ndarray, width: int) -> np.ndarray:
    """At most ``width`` of the states of a mask, evenly spread, first and last among them."""
    states = np.flatnonzero(mask)
    if len(states) <= width:
        return mask
    result = np.zeros_like(mask)
    result[states[np.linspace(0, len(states) - 1, width).astype(int)]] = True
    return result


def _functions(multipliers: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """Weights of value and multipliers of costs whose sweeps bound what a label can still become."""
    count = len(multipliers)
    functions = [(1.0, multipliers)]
    if count == 1:
        functions += [(1.0, multipliers * factor) for factor in _SPREAD if multipliers.any()]
    else:
        for factor in _SPREAD_OF_MANY:
            functions += [
                (1.0, multipliers * np.where(np.arange(count) == axis, factor, 1.0))
                for axis in range(count)
                if multipliers[axis] > 0
            ]
    return functions + [(0.0, row) for row in np.eye(count)]
