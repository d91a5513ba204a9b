"""Solve, rank shared channels again by the blocks that stay, solve again: until the value no longer rises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.importance.values import LossValues
from mdp_mmdet3d.solver.build import Kept, Latency, Ranking, build_problem, kept_elements
from mdp_mmdet3d.solver.problem import PruningProblem
from mdp_mmdet3d.solver.result import SolveResult
from mdp_mmdet3d.space.types import PruningSpace

MAX_ROUNDS = 5


@dataclass(frozen=True)
class RankedSolution:
    """The best solution over all rankings that were tried.

    Attributes:
        problem: The program under the final ranking.
        result: Its solution.
        kept: Kept elements per dimension, and removed blocks.
        first_objective: Value under the first ranking, before any block was removed.
        rounds: How often the program was solved.
    """

    problem: PruningProblem
    result: SolveResult
    kept: Kept
    first_objective: float
    rounds: int


def solve_ranked(
    space: PruningSpace,
    importance: ImportanceTable,
    latency: Latency,
    solve: Callable[[PruningProblem], SolveResult],
    values: LossValues | None = None,
) -> RankedSolution:
    """Remove the loss of fixing the channel order before it is known which blocks stay (docs/method.md, section 4.1).

    Args:
        space: What may be pruned.
        importance: What each element is worth.
        latency: What each operator costs.
        solve: Solves one program for the budget at hand.
        values: Values in units of loss. They do not depend on the ranking, which then only tells what is kept.
    """
    ranking = Ranking.by_importance(space, importance)
    problem = build_problem(space, importance, latency, ranking, values)
    result = solve(problem)
    best = RankedSolution(problem, result, kept_elements(space, ranking, result.plan), result.objective, 1)
    if values is not None:
        return best
    for rounds in range(2, MAX_ROUNDS + 1):
        removed = best.kept[1]
        kept = frozenset(b.name for b in space.blocks if b.name not in removed)
        ranking = Ranking.by_importance(space, importance, kept)
        problem = build_problem(space, importance, latency, ranking)
        result = solve(problem)
        if result.objective <= best.result.objective * (1 + 1e-9):
            return RankedSolution(best.problem, best.result, best.kept, best.first_objective, rounds)
        best = RankedSolution(problem, result, kept_elements(space, ranking, result.plan), best.first_objective, rounds)
    return best
