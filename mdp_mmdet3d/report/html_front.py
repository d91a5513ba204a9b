"""Plans for other budgets around the chosen one: what more latency would buy, within a bounded time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from mdp_mmdet3d.errors import InfeasibleBudgetError
from mdp_mmdet3d.report.html_inputs import RunFiles
from mdp_mmdet3d.solver.build import LATENCY
from mdp_mmdet3d.solver.problem import ProblemStructure, PruningProblem
from mdp_mmdet3d.solver.result import SolveOptions, SolveResult, SolveStatus
from mdp_mmdet3d.solver.route import NoPlanError, solve

NEIGHBOURS = (1.05, 0.95, 1.10, 0.90)  # of the budget; solved first
WIDE = 11  # budgets from the smallest reachable latency to the dense one
TIME_LIMIT_S = 60.0  # of all of them


@dataclass(frozen=True)
class FrontPoint:
    """The most valuable plan within one budget.

    Attributes:
        budget_ms: The budget, in the milliseconds that ``problem.npz`` is written in.
        latency_ms: What the plan takes, predicted.
        value: What it is worth.
        removed_blocks: How many it removes.
        proven: Whether no better plan exists.
        of_budget: Budget relative to the run's, for a neighbour of the chosen plan; 1 for the chosen plan itself.
    """

    budget_ms: float
    latency_ms: float
    value: float
    removed_blocks: int
    proven: bool
    of_budget: float | None = None


@dataclass(frozen=True)
class Front:
    """Plans by growing latency, the chosen and the dense one among them; ``left_out`` budgets met the time limit."""

    points: tuple[FrontPoint, ...]
    chosen: FrontPoint
    dense: FrontPoint
    left_out: int
    seconds: float

    def neighbour(self, of_budget: float) -> FrontPoint | None:
        """The plan for this multiple of the budget."""
        return next((point for point in self.points if point.of_budget == of_budget), None)


def front(files: RunFiles, time_limit_s: float = TIME_LIMIT_S) -> Front | str:
    """Solve for budgets near the run's first, then for others from the smallest to the dense latency.

    Args:
        files: The run.
        time_limit_s: Limit of all solves together.

    Returns:
        The plans, or why there are none.
    """
    problem = files.problem
    if isinstance(problem, str):
        return problem
    start = time.monotonic()
    solver = files.report["solver"]
    budget = float(solver["budgets"][LATENCY])
    chosen = FrontPoint(
        budget, solver["costs"][LATENCY], solver["objective"], len(files.removed), solver["status"] == "optimal", 1.0
    )
    ends = problem.dense
    dense = FrontPoint(ends.costs[LATENCY], ends.costs[LATENCY], ends.value, 0, True)
    smallest = float(solver["minimum"][LATENCY])
    known: list[ProblemStructure] = []
    found: dict[float, FrontPoint] = {}
    left_out = 0
    wanted: list[tuple[float, float | None]] = [(budget * share, share) for share in NEIGHBOURS]
    wanted += [(float(ms), None) for ms in np.linspace(smallest * (1 + 1e-9), dense.latency_ms, WIDE + 1)[:-1]]
    for budget_ms, share in wanted:
        if not smallest <= budget_ms < dense.latency_ms:
            continue
        left_s = time_limit_s - (time.monotonic() - start)
        result = _solve(problem, budget_ms, left_s, known) if left_s > 0 else None
        if result is None:
            left_out += 1
            continue
        known.append(result.plan)
        found[budget_ms] = FrontPoint(
            budget_ms,
            result.costs[LATENCY],
            result.objective,
            sum(not kept for kept in result.plan.kept),
            result.status is SolveStatus.OPTIMAL,
            share,
        )
    points = sorted([*found.values(), chosen, dense], key=lambda point: (point.latency_ms, point.value))
    return Front(tuple(points), chosen, dense, left_out, time.monotonic() - start)


def _solve(
    problem: PruningProblem, budget_ms: float, left_s: float, known: list[ProblemStructure]
) -> SolveResult | None:
    try:
        return solve(problem, {LATENCY: budget_ms}, SolveOptions(time_limit_s=left_s), hints=known[-6:])
    except (InfeasibleBudgetError, NoPlanError):
        return None
