"""The Lagrangian bound: min over multipliers of max over structures, exact by elimination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mdp_mmdet3d.extras import check_installed
from mdp_mmdet3d.solver.elimination import Elimination, Sweep
from mdp_mmdet3d.solver.graph import FORBIDDEN

ROUNDING = 1e-12
"""Relative error that a sum of some hundred floats may have; bounds are widened by it."""
_LARGEST_MULTIPLIER = 1e6


@dataclass
class Dual:
    """Best multipliers found and what was met on the way.

    Attributes:
        multipliers: ``(M,)``, >= 0.
        bound: No assignment within the limits is worth more.
        sweep: The sweep at ``multipliers``.
        incumbent: Most valuable assignment within the limits that was met, if any.
        value: Its value.
        sweeps: Number of sweeps.
    """

    multipliers: np.ndarray
    bound: float
    sweep: Sweep
    incumbent: list[int] | None
    value: float
    sweeps: int


def minimise_dual(
    tree: Elimination, limits: np.ndarray, start: list[list[int]], tolerance: float = 1e-9, max_sweeps: int = 60
) -> Dual:
    """Minimise ``max over assignments of value - m @ (costs - limits)`` over ``m >= 0`` by cutting planes.

    Every assignment is a plane under that function of m; the next multipliers are the minimum of the upper
    envelope of the planes met so far. With one limit this ends at the exact minimum.

    Args:
        tree: Elimination of the scaled graph.
        limits: ``(M,)`` limits on the graph's costs.
        start: Assignments to begin with, e.g. the cheapest ones.
        tolerance: Relative distance of envelope and function at which it stops.
        max_sweeps: Limit; the bound is valid after any number of sweeps.
    """
    graph = tree.graph
    planes: list[tuple[float, np.ndarray]] = []
    incumbent, best_value = None, -np.inf

    def add(assignment: list[int]) -> None:
        nonlocal incumbent, best_value
        value, costs = graph.measure(assignment)
        planes.append((value, costs - limits))
        if (costs <= limits).all() and value > max(best_value, FORBIDDEN / 2):
            incumbent, best_value = assignment, value

    for assignment in start:
        add(assignment)
    multipliers, envelope = _envelope_minimum(planes) if planes else (np.zeros(len(limits)), -np.inf)
    best: tuple[float, np.ndarray, Sweep] | None = None
    sweeps = 0
    while sweeps < max_sweeps:
        sweeps += 1
        sweep = tree.sweep_weighted(1.0, multipliers)
        bound = sweep.total + float(multipliers @ limits)
        bound += ROUNDING * (abs(bound) + float(multipliers @ np.abs(limits)))
        if best is None or bound < best[0]:
            best = (bound, multipliers, sweep)
        add(sweep.assignment())
        # A bound below 0 proves that the limits exclude each other: every assignment is worth at least 0.
        if bound - envelope <= tolerance * abs(bound) or bound < 0.0:
            break
        multipliers, envelope = _envelope_minimum(planes)
    assert best is not None  # max_sweeps >= 1
    return Dual(best[1], best[0], best[2], incumbent, best_value, sweeps)


def _envelope_minimum(planes: list[tuple[float, np.ndarray]]) -> tuple[np.ndarray, float]:
    """Multipliers >= 0 where the largest ``value - m @ slope`` is smallest, and that number."""
    values = np.array([value for value, _ in planes])
    slopes = np.array([slope for _, slope in planes])
    if slopes.shape[1] > 1:
        return _envelope_minimum_lp(values, slopes)
    slopes = slopes[:, 0]
    falling, rising = slopes > 0, slopes <= 0
    if not falling.any():
        return np.zeros(1), float(values.max())
    if not rising.any():
        return np.array([_LARGEST_MULTIPLIER]), float((values - _LARGEST_MULTIPLIER * slopes).max())
    meets = (values[falling][:, None] - values[rising]) / (slopes[falling][:, None] - slopes[rising])
    candidates = np.append(0.0, np.clip(meets, 0.0, None).ravel())
    heights = (values[:, None] - slopes[:, None] * candidates).max(axis=0)
    lowest = int(np.argmin(heights))
    return candidates[lowest : lowest + 1], float(heights[lowest])


def _envelope_minimum_lp(values: np.ndarray, slopes: np.ndarray) -> tuple[np.ndarray, float]:
    check_installed("pyscipopt", "solver", "the solver")
    from pyscipopt import LP

    lp: Any = LP("multipliers", sense="minimize")
    infinity = lp.infinity()
    lp.addCol([], obj=1.0, lb=-infinity, ub=infinity)
    for _ in range(slopes.shape[1]):
        lp.addCol([], obj=0.0, lb=0.0, ub=_LARGEST_MULTIPLIER)
    for value, slope in zip(values, slopes):
        entries = [(0, 1.0), *((axis + 1, float(s)) for axis, s in enumerate(slope))]
        lp.addRow(entries, lhs=float(value), rhs=infinity)
    lp.solve()
    multipliers = np.maximum(np.array(lp.getPrimal()[1:]), 0.0)
    return multipliers, float((values - slopes @ multipliers).max())
