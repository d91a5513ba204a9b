"""From problem and budgets to a scaled group graph that holds only what the budgets allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mdp_mmdet3d.errors import InfeasibleBudgetError, MdpError
from mdp_mmdet3d.solver.conditioning import conditions
from mdp_mmdet3d.solver.elimination import Elimination, TooWideError
from mdp_mmdet3d.solver.graph import FactorGraph, build_graph
from mdp_mmdet3d.solver.minimum import minimum_by_scip
from mdp_mmdet3d.solver.problem import ProblemStructure, PruningProblem
from mdp_mmdet3d.solver.result import FEASIBILITY_TOLERANCE

_INNER_TOLERANCE = 0.99 * FEASIBILITY_TOLERANCE
"""What the search allows: what it finds must pass the check on the original tables."""
_DECIMALS = 9


@dataclass(frozen=True)
class ScaledProblem:
    """A problem under budgets, in units in which value and budgets are about 1.

    Attributes:
        problem: The original.
        budgets: Per limited metric, in the metric's unit.
        graph: Its group graph without the states that no budget allows.
        limits: ``(M,)`` limits on the graph's costs, tolerance included, offsets taken off.
        value_unit: Value of 1 in the graph.
        minimum: Per limited metric, the smallest cost that any plan reaches.
        minimum_all_blocks: The same while every block stays, None where masks exclude that.
        cheapest: Per limited metric, a plan that reaches the minimum.
        states_total: States before any was dropped.
    """

    problem: PruningProblem
    budgets: dict[str, float]
    graph: FactorGraph
    limits: np.ndarray
    value_unit: float
    minimum: dict[str, float]
    minimum_all_blocks: dict[str, float | None]
    cheapest: tuple[ProblemStructure, ...]
    states_total: int

    def rescaled(self, largest_value: float) -> ScaledProblem:
        """With about ``largest_value``, which no plan within the limits exceeds, as the unit of value."""
        unit = power_of_two(largest_value)
        graph = self.graph.rescaled(unit).without_entries_beyond(self.limits, 1.0 + 1e-6)
        return replace(self, graph=graph, value_unit=self.value_unit * unit)


class NoStructureError(MdpError):
    """The masks of a problem exclude every structure, whatever the budget."""


def power_of_two(number: float) -> float:
    """The smallest power of two that is not below a positive number."""
    return float(2.0 ** np.ceil(np.log2(number)))


def check_budgets(problem: PruningProblem, budgets: Mapping[str, float]) -> dict[str, float]:
    """The budgets as floats in the problem's order; raises `MdpError` on an unknown name or a bad number."""
    known = f"problem {problem.name!r} knows {', '.join(problem.metrics)}"
    for metric, budget in budgets.items():
        if metric not in problem.metrics:
            raise MdpError(f"there is no metric {metric!r} to limit; {known}")
        if not np.isfinite(budget) or budget < 0:
            raise MdpError(f"budget for {metric!r} is {budget!r}; it must be a finite number >= 0")
    if not budgets:
        raise MdpError(f"no budget given; {known}")
    return {metric: float(budgets[metric]) for metric in problem.metrics if metric in budgets}


def within(budget: float, cost: float) -> bool:
    """Whether a cost keeps a budget, up to `FEASIBILITY_TOLERANCE`."""
    return cost <= budget * (1.0 + FEASIBILITY_TOLERANCE)


def minimum_cost(
    problem: PruningProblem,
    metric: str,
    *,
    remove_blocks: bool = True,
    time_limit_s: float = 600.0,
    isolate: bool = True,
) -> tuple[float, ProblemStructure]:
    """Smallest reachable cost of one metric and a plan that reaches it, exact.

    Args:
        problem: What may be chosen.
        metric: Name of the cost.
        remove_blocks: Whether blocks may be removed.
        time_limit_s: Limit for SCIP, which is asked only where elimination is out of reach.
        isolate: Run SCIP in a child process.

    Raises:
        NoStructureError: The problem's masks exclude every structure.
    """
    limits: dict[str, Any] = {"time_limit_s": time_limit_s, "isolate": isolate}
    if problem.global_dimensions:
        return _minimum_over_conditions(problem, metric, remove_blocks, limits)
    try:
        graph = build_graph(problem, [metric], 1.0, [_largest_cost(problem, metric)])
        found = _cheapest(graph if remove_blocks else graph.with_all_blocks(), 0)
    except TooWideError:
        found = minimum_by_scip(problem, metric, remove_blocks=remove_blocks, **limits)
    if found is None:
        raise no_structure(problem, remove_blocks)
    return found


def _minimum_over_conditions(
    problem: PruningProblem, metric: str, remove_blocks: bool, limits: Mapping[str, Any]
) -> tuple[float, ProblemStructure]:
    best: tuple[float, ProblemStructure] | None = None
    for case in conditions(problem):
        try:
            cost, plan = minimum_cost(case.problem, metric, remove_blocks=remove_blocks, **limits)
        except NoStructureError:
            continue
        if best is None or cost < best[0]:
            best = cost, case.lift(plan)
    if best is None:
        raise no_structure(problem, remove_blocks)
    return best


def scale(problem: PruningProblem, budgets: Mapping[str, float]) -> ScaledProblem:
    """Normalise, check that each budget can be reached, and drop the states that none of its plans uses.

    Raises:
        MdpError: A budget has an unknown name or is no number.
        InfeasibleBudgetError: A budget is below the smallest reachable cost.
        NoStructureError: The problem's masks exclude every structure.
        TooWideError: Elimination is out of reach.
    """
    budgets = check_budgets(problem, budgets)
    metrics = tuple(budgets)
    units = [
        exact_unit([term.costs[metric] for term in problem.terms], budget or _smallest_cost(problem, metric))
        for metric, budget in budgets.items()
    ]
    values = [term.value for term in problem.terms if term.value is not None]
    value_unit = exact_unit(values, sum(float(value.max()) for value in values) - problem.least_value or 1.0)
    graph = build_graph(problem, metrics, value_unit, units)
    shares = np.array([budget / unit for budget, unit in zip(budgets.values(), units)])
    limits = shares * (1.0 + _INNER_TOLERANCE) - graph.offset_costs
    tree = Elimination(graph)
    keep = [np.ones(len(states), dtype=bool) for states in graph.states]
    minimum: dict[str, float] = {}
    all_blocks: dict[str, float | None] = {}
    cheapest = []
    complete = graph.with_all_blocks()
    for index, (metric, budget) in enumerate(budgets.items()):
        sweep = tree.sweep_weighted(0.0, np.eye(len(metrics))[index])
        if not graph.possible(sweep.total):
            raise no_structure(problem)
        plan = graph.decode(sweep.assignment())
        minimum[metric] = problem.evaluate(plan).costs[metric]
        kept = _cheapest(complete, index)
        all_blocks[metric] = None if kept is None else kept[0]
        if not within(budget, minimum[metric]):
            raise infeasible(problem, metric, budget, minimum[metric])
        cheapest.append(plan)
        floor = -limits[index] - 1e-11 * (1.0 + abs(limits[index]))
        keep = [mask & (best >= floor) for mask, best in zip(keep, sweep.state_marginals)]
    if not all(mask.any() for mask in keep):
        raise jointly_infeasible(problem, budgets, minimum)
    total = sum(graph.sizes)
    graph = graph.restrict(keep).without_entries_beyond(limits, np.inf)
    return ScaledProblem(problem, budgets, graph, limits, value_unit, minimum, all_blocks, tuple(cheapest), total)


def exact_unit(arrays: Sequence[np.ndarray], size: float) -> float:
    """A unit of about ``size`` (at least that) in whose binary fractions the numbers are exact, if they allow it.

    Numbers with a few decimals, as in measured tables, are multiples of a power of ten; then so is the unit, times a
    power of two. Sums of such numbers tie exactly in fixed point.
    """
    decimals = next((k for k in range(_DECIMALS + 1) if all(_on_grid(array * 10.0**k) for array in arrays)), 0)
    return float(2.0 ** np.ceil(np.log2(size * 10.0**decimals))) / 10.0**decimals


def _on_grid(array: np.ndarray) -> bool:
    return bool((np.abs(array - np.rint(array)) <= 1e-7).all() and np.abs(array).max(initial=0.0) < 2.0**40)


def infeasible(problem: PruningProblem, metric: str, budget: float, minimum: float) -> InfeasibleBudgetError:
    """The error for a budget below the smallest reachable cost."""
    return InfeasibleBudgetError(
        f"budget of {budget:.6g} for {metric!r} cannot be reached by {problem.name!r}: the cheapest allowed "
        f"structure takes {minimum:.6g}. Raise the budget to {_rounded_up(minimum):.6g} or allow more to be pruned.",
        minimum,
    )


def jointly_infeasible(
    problem: PruningProblem, budgets: Mapping[str, float], minimum: Mapping[str, float]
) -> InfeasibleBudgetError:
    """The error for budgets that can be reached one by one but not together."""
    reached = ", ".join(f"{metric} {budget:.6g} (alone: {minimum[metric]:.6g})" for metric, budget in budgets.items())
    return InfeasibleBudgetError(
        f"no structure of {problem.name!r} keeps these budgets at once: {reached}. Raise one of them.",
        next(iter(minimum.values())),
    )


def no_structure(problem: PruningProblem, remove_blocks: bool = True) -> NoStructureError:
    """The error for masks that exclude every structure; names the first mask after which nothing is left."""
    if not remove_blocks:
        return NoStructureError(f"the masks of {problem.name!r} exclude every structure that keeps all blocks")
    masked = [index for index, term in enumerate(problem.terms) if term.allowed is not None]

    def possible(count: int) -> bool:
        ignored = set(masked[count:])
        terms = tuple(replace(t, allowed=None) if i in ignored else t for i, t in enumerate(problem.terms))
        return _cheapest(build_graph(replace(problem, terms=terms), problem.metrics[:1], 1.0, [1.0]), 0) is not None

    try:
        low, high = 0, len(masked)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if possible(middle) else (low, middle)
        culprit = f"with that of term {problem.terms[masked[high - 1]].name!r} nothing is left"
    except TooWideError:
        culprit = f"{len(masked)} terms have one"
    return NoStructureError(f"the masks of {problem.name!r} exclude every structure: {culprit}")


def _rounded_up(number: float) -> float:
    """At least ``number`` when printed with six digits."""
    return number if float(f"{number:.6g}") >= number else number * (1.0 + 1e-5)


def _cheapest(graph: FactorGraph, metric: int) -> tuple[float, ProblemStructure] | None:
    """Smallest cost and its plan, None where nothing is allowed."""
    sweep = Elimination(graph).sweep_weighted(0.0, np.eye(len(graph.metrics))[metric])
    if not graph.possible(sweep.total):
        return None
    plan = graph.decode(sweep.assignment())
    return graph.problem.evaluate(plan).costs[graph.metrics[metric]], plan


def _largest_cost(problem: PruningProblem, metric: str) -> float:
    return max((float(term.costs[metric].max()) for term in problem.terms), default=0.0) or 1.0


def _smallest_cost(problem: PruningProblem, metric: str) -> float:
    """Smallest positive cost: under a budget of 0 it must count, in whatever unit."""
    positive = [float(cost[cost > 0].min()) for cost in (t.costs[metric] for t in problem.terms) if (cost > 0).any()]
    return min(positive, default=1.0)
