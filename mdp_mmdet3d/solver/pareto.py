"""The whole trade-off: the most valuable plan for every budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdp_mmdet3d.errors import InfeasibleBudgetError, MdpError
from mdp_mmdet3d.files import write_json
from mdp_mmdet3d.solver.problem import ProblemStructure, PruningProblem
from mdp_mmdet3d.solver.result import SolveOptions, SolveResult
from mdp_mmdet3d.solver.route import solve
from mdp_mmdet3d.solver.scaling import check_budgets, minimum_cost

SCHEMA_VERSION = 1
_HINTS = 6
_MOST = 100_000


@dataclass(frozen=True)
class ParetoFront:
    """Plans that are worth more than every cheaper plan.

    Attributes:
        problem: Name of the problem.
        metric: Cost on the first axis.
        dense_cost: The dense plan's cost.
        dense_value: The dense plan's value.
        points: By growing cost and value; the certified result of each budget that added a plan.
    """

    problem: str
    metric: str
    dense_cost: float
    dense_value: float
    points: tuple[SolveResult, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Per point: cost, share of the dense cost, value, share of the dense value, blocks kept, status."""
        return [
            {
                "cost": point.costs[self.metric],
                "cost_share": point.costs[self.metric] / self.dense_cost if self.dense_cost else 1.0,
                "value": point.objective,
                "value_share": point.objective / self.dense_value if self.dense_value else 1.0,
                "removed_blocks": sum(not kept for kept in point.plan.kept),
                "status": point.status.value,
                "gap": point.gap,
                "seconds": point.seconds["total"],
            }
            for point in self.points
        ]

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        write_json(
            path,
            {
                "schema_version": SCHEMA_VERSION,
                "problem": self.problem,
                "metric": self.metric,
                "dense_cost": self.dense_cost,
                "dense_value": self.dense_value,
                "points": [{**row, "plan": point.plan.to_json()} for row, point in zip(self.rows(), self.points)],
            },
        )


def pareto(
    problem: PruningProblem,
    points: int = 50,
    *,
    step: float | None = None,
    metric: str | None = None,
    limits: Mapping[str, float] | None = None,
    options: SolveOptions | None = None,
) -> ParetoFront:
    """Solve for budgets from the smallest reachable cost to that of the most valuable plan.

    Every point is on the exact front: nothing within its cost is worth more, and among equals it is the cheapest.
    Budgets between two neighbours of the front give the same plan, so there may be fewer points than budgets; with
    fixed limits, budgets that cannot be reached together with them are left out.

    Args:
        problem: What may be chosen.
        points: Number of budgets, evenly spaced.
        step: Distance of budgets in the metric's unit instead.
        metric: Cost to trade off, the problem's first one by default.
        limits: Fixed budgets for other metrics.
        options: As for `solve`.

    Raises:
        MdpError: Less than two points, a step that is no positive number, or an unknown metric.
        InfeasibleBudgetError: The fixed limits cannot be kept.
    """
    metric = metric or problem.metrics[0]
    found = tuple(iterate(problem, points, step=step, metric=metric, limits=limits, options=options))
    return ParetoFront(problem.name, metric, problem.dense.costs[metric], problem.dense.value, found)


def iterate(
    problem: PruningProblem,
    points: int = 50,
    *,
    step: float | None = None,
    metric: str | None = None,
    limits: Mapping[str, float] | None = None,
    options: SolveOptions | None = None,
) -> Iterator[SolveResult]:
    """The points of `pareto` one by one, cheapest first."""
    metric = metric or problem.metrics[0]
    limits = dict(limits or {})
    if not 2 <= points <= _MOST or (step is not None and not step > 0.0):
        raise MdpError(f"a Pareto front needs 2 to {_MOST} points and a step > 0, got {points} and {step}")
    if metric in limits:
        raise MdpError(f"{metric!r} is the metric to trade off; it cannot be limited too")
    check_budgets(problem, {metric: 0.0, **limits})
    most = sum(float(term.costs[metric].max()) for term in problem.terms)
    top = solve(problem, {**limits, metric: most}, options)
    low = minimum_cost(problem, metric)[0]
    high = top.costs[metric]
    if step is not None and high - low > _MOST * step:
        raise MdpError(
            f"a step of {step} gives more than {_MOST} points between {low:.6g} and {high:.6g}; take a larger one"
        )
    budgets = np.linspace(low, high, points) if step is None else np.append(np.arange(low, high, step), high)
    known: list[ProblemStructure] = [top.plan]
    last: SolveResult | None = None
    for budget in budgets[:-1]:
        if last is not None and budget < last.costs[metric]:
            continue
        try:
            result = solve(problem, {**limits, metric: float(budget)}, options, hints=known[-_HINTS:])
        except InfeasibleBudgetError:
            if not limits:
                raise
            continue  # the fixed limits leave nothing this cheap
        if last is None or result.objective > last.objective * (1.0 + 1e-12):
            known.append(result.plan)
            last = result
            yield result
    if last is None or top.objective > last.objective * (1.0 + 1e-12):
        yield top
