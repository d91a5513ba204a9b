"""Exact optimum over all combinations of the global dimensions' options, most of which a bound rules out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mdp_mmdet3d.errors import InfeasibleBudgetError
from mdp_mmdet3d.solver.conditioning import Condition, condition, conditions
from mdp_mmdet3d.solver.elimination import TooWideError
from mdp_mmdet3d.solver.problem import Evaluation, ProblemStructure, PruningProblem
from mdp_mmdet3d.solver.result import Combinations, SolveOptions, SolveResult
from mdp_mmdet3d.solver.scaling import (
    NoStructureError,
    check_budgets,
    infeasible,
    jointly_infeasible,
    minimum_cost,
    no_structure,
    scale,
    within,
)

if TYPE_CHECKING:
    from mdp_mmdet3d.solver.route import Route

_TIE = 1e-11  # relative; below it two values or costs are equal


@dataclass
class _Best:
    """The best plan so far and what it is worth and costs."""

    plan: ProblemStructure
    evaluation: Evaluation


class CombinationSearch:
    """State of one solve.

    Args:
        problem: Problem with global dimensions.
        budgets: Upper limit per metric.
        hints: Plans of earlier solves.
        route: Books time and warnings, makes the result.
    """

    def __init__(
        self, problem: PruningProblem, budgets: Mapping[str, float], hints: Sequence[ProblemStructure], route: Route
    ) -> None:
        self.problem = problem
        self.budgets = check_budgets(problem, budgets)
        self.hints = list(hints)
        self.route = route
        self.best: _Best | None = None
        self.minimum: dict[str, float] = {}
        self.minimum_all_blocks: dict[str, float | None] = dict.fromkeys(self.budgets)
        self.states = [0, 0]
        self.proofs: set[str] = set()

    def run(self) -> SolveResult:
        """Bound every combination, then solve them from the highest bound downwards until no other can be better."""
        total, candidates = 0, []
        for case in conditions(self.problem):
            total += 1
            bound = self._bound(case)
            if bound is not None:
                candidates.append((bound, case.combination))
        if not candidates:
            self._raise_infeasible()
        candidates.sort(reverse=True)
        upper, solved, dropped, unsolved = float("-inf"), 0, 0, 0
        for bound, combination in candidates:
            if bound < self._floor():
                dropped += 1
            elif time.perf_counter() > self.route.deadline:
                unsolved += 1
                upper = max(upper, bound)
            else:
                solved += 1
                upper = max(upper, min(bound, self._solve(condition(self.problem, combination))))
        if self.best is None and not unsolved:
            self._raise_infeasible()
        proofs = ", ".join(sorted(filter(None, self.proofs))) or "lagrangian bound"
        self.route.proof = f"bounds of {total} combinations, {proofs}"
        result = self.route.certified(
            self.problem,
            self.budgets,
            None if self.best is None else self.best.plan,
            upper,
            self.minimum,
            self.minimum_all_blocks,
            (self.states[0], self.states[1]),
        )
        counted = Combinations(total, total - len(candidates), dropped, solved, unsolved)
        return replace(result, combinations=counted)

    def _route(self) -> Route:
        """A route for one combination that has the time that is left."""
        left = max(self.route.deadline - time.perf_counter(), 0.0)
        route = type(self.route)(replace(self.route.options, time_limit_s=left))
        route.seconds, route.warnings = self.route.seconds, self.route.warnings
        return route

    def _bound(self, case: Condition) -> float | None:
        """No plan of a combination is worth more; None where there is no plan within the budgets."""
        route = self._route()
        try:
            with route.phase("minimum"):
                scaled = scale(case.problem, self.budgets)
            self._note_minimum(scaled.minimum, scaled.minimum_all_blocks)
            with route.phase("lagrangian"):
                # After the deadline one sweep must do: any bound is better than none.
                late = time.perf_counter() > self.route.deadline
                route.options = replace(route.options, lagrangian=route.options.lagrangian and not late)
                route.bound(scaled, self._known(case))
        except NoStructureError:
            return None
        except InfeasibleBudgetError:
            self._note_minimum(*self._minima(case.problem))
            return None
        except TooWideError:
            return self._bound_without_elimination(case)
        self.states[0] += scaled.states_total
        self._offer(case, route.progress.plan)
        return route.upper

    def _bound_without_elimination(self, case: Condition) -> float | None:
        try:
            minimum, complete = self._minima(case.problem)
        except NoStructureError:
            return None
        self._note_minimum(minimum, complete)
        reachable = all(within(budget, minimum[metric]) for metric, budget in self.budgets.items())
        return case.problem.most_value if reachable else None

    def _solve(self, case: Condition) -> float:
        """Solve one combination as far as it may hold a plan as good as the best one; no plan of it is worth more."""
        route = self._route()
        floor = self._floor()
        try:
            with route.phase("minimum"):
                scaled = scale(case.problem, self.budgets)
        except TooWideError as error:
            try:
                result = route.solve_by_scip(case.problem, self.budgets, str(error))
            except InfeasibleBudgetError:
                return float("-inf")
            self.proofs.add(result.proof)
            self._offer(case, result.plan)
            return result.bound
        try:
            route.run(scaled, self._known(case), floor)
        except InfeasibleBudgetError:
            return float("-inf")
        self.states[1] += route.states_removed()
        self.proofs.add(route.proof)
        self._offer(case, route.progress.plan)
        return float("-inf") if route.progress.exact else route.upper

    def _known(self, case: Condition) -> list[ProblemStructure]:
        known = self.hints if self.best is None else [*self.hints, self.best.plan]
        return [case.lower(plan) for plan in known]

    def _floor(self) -> float:
        """What a plan must be worth to be of interest: as much as the best one, ties included."""
        if self.best is None:
            return float("-inf")
        value = self.best.evaluation.value
        return value - _TIE * (value - self.problem.least_value)

    def _offer(self, case: Condition, plan: ProblemStructure | None) -> None:
        """Take over a plan of a combination if it comes before the best one in the order of plans."""
        if plan is None:
            return
        lifted = case.lift(plan)
        found = _Best(lifted, self.problem.evaluate(lifted))
        if self.best is None or self._precedes(found, self.best):
            self.best = found

    def _precedes(self, one: _Best, other: _Best) -> bool:
        pairs = [(one.evaluation.value, other.evaluation.value, self.problem.least_value)]
        pairs += [(-one.evaluation.costs[m], -other.evaluation.costs[m], 0.0) for m in self.budgets]
        for left, right, origin in pairs:
            if abs(left - right) > _TIE * max(abs(left - origin), abs(right - origin)):
                return left > right
        return (one.plan.options, one.plan.kept) > (other.plan.options, other.plan.kept)

    def _note_minimum(self, minimum: Mapping[str, float], all_blocks: Mapping[str, float | None]) -> None:
        for metric, cost in minimum.items():
            self.minimum[metric] = min(cost, self.minimum.get(metric, cost))
        for metric, complete in all_blocks.items():
            known = self.minimum_all_blocks[metric]
            if complete is not None:
                self.minimum_all_blocks[metric] = complete if known is None else min(complete, known)

    def _minima(self, problem: PruningProblem) -> tuple[dict[str, float], dict[str, float | None]]:
        limits: dict[str, Any] = {
            "time_limit_s": self.route.options.time_limit_s,
            "isolate": self.route.options.isolate,
        }
        minimum = {metric: minimum_cost(problem, metric, **limits)[0] for metric in self.budgets}
        complete: dict[str, float | None] = {}
        for metric in self.budgets:
            try:
                complete[metric] = minimum_cost(problem, metric, remove_blocks=False, **limits)[0]
            except NoStructureError:
                complete[metric] = None
        return minimum, complete

    def _raise_infeasible(self) -> None:
        if not self.minimum:
            raise no_structure(self.problem)
        for metric, budget in self.budgets.items():
            if not within(budget, self.minimum[metric]):
                raise infeasible(self.problem, metric, budget, self.minimum[metric])
        raise jointly_infeasible(self.problem, self.budgets, self.minimum)


def solve_combinations(
    problem: PruningProblem,
    budgets: Mapping[str, float],
    options: SolveOptions,
    hints: Sequence[ProblemStructure],
    route_type: type[Route],
) -> SolveResult:
    """`solve` for a problem with global dimensions; arguments as there."""
    return CombinationSearch(problem, budgets, hints, route_type(options)).run()
