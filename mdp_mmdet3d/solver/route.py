"""`solve`: the exact route from a problem and budgets to a certified plan."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.solver.certificate import certify
from mdp_mmdet3d.solver.combinations import solve_combinations
from mdp_mmdet3d.solver.deepening import Progress, deepen, surviving
from mdp_mmdet3d.solver.elimination import Elimination, TooWideError
from mdp_mmdet3d.solver.lagrangian import Dual, minimise_dual
from mdp_mmdet3d.solver.problem import ProblemStructure, PruningProblem
from mdp_mmdet3d.solver.proof import prove
from mdp_mmdet3d.solver.remainder import remainder
from mdp_mmdet3d.solver.result import SolveOptions, SolveResult, SolveStatus, relative_gap
from mdp_mmdet3d.solver.scaling import (
    NoStructureError,
    ScaledProblem,
    check_budgets,
    infeasible,
    jointly_infeasible,
    minimum_cost,
    scale,
    within,
)

_SMALL_SHARE = 1e-3
_RESCALINGS = 8
_LABEL_SHARE = 0.6  # of the time limit, where SCIP may still need its part


class NoPlanError(MdpError):
    """A limit was hit before any plan was found."""


def solve(
    problem: PruningProblem,
    budgets: Mapping[str, float],
    options: SolveOptions | None = None,
    hints: Sequence[ProblemStructure] = (),
) -> SolveResult:
    """Choose the most valuable structure within the budgets, with proof (docs/method.md, section 5).

    Among plans of equal value the cheaper one is chosen (first metric first), then the lexicographically larger.

    With global dimensions, every combination of their options is bounded and those that may hold the optimum are
    solved; the answer is as exact and the same order decides ties.

    Args:
        problem: What may be chosen.
        budgets: Upper limit per metric in the metric's unit, e.g. ``{"latency_ms": 120.0}``.
        options: Tolerance, limits, phases.
        hints: Plans of earlier solves, within the budgets or not: they speed up the bound.

    Raises:
        InfeasibleBudgetError: No plan keeps the budgets; the message tells the smallest reachable cost.
        NoStructureError: The problem's masks exclude every structure.
        NoPlanError: A limit was hit before any plan was found.
        MdpError: A budget has an unknown name or is no number.
    """
    if problem.global_dimensions:
        return solve_combinations(problem, budgets, options or SolveOptions(), hints, Route)
    route = Route(options or SolveOptions())
    try:
        with route.phase("minimum"):
            scaled = scale(problem, budgets)
    except TooWideError as error:
        return route.solve_by_scip(problem, check_budgets(problem, budgets), str(error))
    route.run(scaled, hints)
    return route.result()


class Route:
    """State of one solve: what is known after each phase.

    Attributes:
        floor: Plans worth less, in the scaled graph's unit, are of no interest.
        anything: Whether that is every plan's least value, so that a search without a plan means that there is none.
    """

    scaled: ScaledProblem
    dual: Dual
    progress: Progress

    def __init__(self, options: SolveOptions) -> None:
        self.options = options
        self.start = time.perf_counter()
        self.deadline = self.start + options.time_limit_s
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self.proof = "lagrangian bound"
        self.floor, self.anything = 0.0, True

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book the time of the block under ``name``."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def run(self, scaled: ScaledProblem, hints: Sequence[ProblemStructure], floor: float = float("-inf")) -> None:
        """All phases.

        Args:
            scaled: The problem.
            hints: Plans of earlier solves.
            floor: Value below which plans are of no interest. Where no plan reaches it, the search ends without one.
        """
        with self.phase("lagrangian"):
            self.bound(scaled, hints)
        self.floor = max(floor / self.scaled.value_unit - self.scaled.graph.offset_value, 0.0)
        self.anything = floor == float("-inf")
        if self.options.label_search:
            with self.phase("labels"):
                self.search()
        if self.open and self.options.scip:
            with self.phase("scip"):
                self.prove()

    @property
    def open(self) -> bool:
        """Whether the gap is not closed yet."""
        progress = self.progress
        return not (progress.exact or progress.closed(self.options.gap) or progress.upper < self.floor)

    @property
    def upper(self) -> float:
        """No plan is worth more, in the problem's unit."""
        return (self.progress.upper + self.scaled.graph.offset_value) * self.scaled.value_unit

    def bound(self, scaled: ScaledProblem, hints: Sequence[ProblemStructure]) -> None:
        """Lagrangian bound; the unit of value follows it down, so that small optima keep their digits."""
        for _ in range(_RESCALINGS):
            known = [scaled.graph.locate(plan) for plan in (*scaled.cheapest, *hints)]
            tree = Elimination(scaled.graph)
            self.dual = dual = minimise_dual(
                tree,
                scaled.limits,
                [place for place in known if place is not None],
                max_sweeps=60 if self.options.lagrangian else 1,
            )
            if dual.bound < 0.0:
                self._raise_infeasible(scaled)
            if not 0.0 < dual.bound < _SMALL_SHARE:
                break
            scaled = scaled.rescaled(dual.bound)
        self.scaled = scaled
        plan = None if dual.incumbent is None else scaled.graph.decode(dual.incumbent)
        self.progress = Progress(dual.value, dual.bound, plan)

    def search(self) -> None:
        """Label search."""
        share = _LABEL_SHARE if self.options.scip else 1.0
        deepen(
            self.scaled,
            self.dual,
            self.progress,
            gap=self.options.gap,
            floor=self.floor,
            reduce=self.options.reduction,
            deadline=self.start + share * self.options.time_limit_s,
        )
        if self.progress.exact:
            self.proof = "label search"
            if self.progress.plan is None and self.anything:
                self._raise_infeasible(self.scaled)

    def prove(self) -> None:
        """SCIP on what the reduction leaves."""
        scaled, progress = self.scaled, self.progress
        graph = scaled.graph
        if self.options.reduction:
            keep = surviving(self.dual, scaled.limits, max(progress.lower, self.floor))
            if all(mask.any() for mask in keep):
                graph = graph.restrict(keep)
        rest = remainder(graph)
        start = None if progress.plan is None else rest.lower(progress.plan)
        offset = graph.offset_value
        answer = prove(
            rest.problem,
            scaled.budgets,
            value_unit=(progress.upper + max(offset, 0.0)) * scaled.value_unit or 1.0,
            gap=self.options.gap / 2,
            time_limit_s=max(self.deadline - time.perf_counter(), 1.0),
            formulation=self.options.formulation,
            isolate=self.options.isolate,
            start=start,
            floor=float("-inf") if self.anything else (self.floor + offset) * scaled.value_unit,
        )
        self.warnings += answer.warnings
        self.proof = f"scip/{answer.formulation.value}"
        if answer.plan is not None:
            plan = rest.lift(answer.plan)
            value = scaled.problem.evaluate(plan).value / scaled.value_unit - offset
            if value > progress.lower:
                progress.plan, progress.lower = plan, value
        elif progress.plan is None and answer.finished and self.anything:
            self._raise_infeasible(scaled)
        progress.upper = min(progress.upper, answer.bound / scaled.value_unit - offset)

    def result(self) -> SolveResult:
        """The certified answer; raises `NoPlanError` without a plan."""
        scaled, progress = self.scaled, self.progress
        return self.certified(
            scaled.problem,
            scaled.budgets,
            progress.plan,
            float("-inf") if progress.exact else self.upper,
            scaled.minimum,
            scaled.minimum_all_blocks,
            (scaled.states_total, self.states_removed()),
        )

    def states_removed(self) -> int:
        """How many options and block states cannot be part of a plan as good as the one found."""
        left = sum(self.scaled.graph.sizes)
        if self.options.reduction:
            target = max(self.progress.lower, self.floor)
            left = sum(int(mask.sum()) for mask in surviving(self.dual, self.scaled.limits, target))
        return self.scaled.states_total - left

    def certified(
        self,
        problem: PruningProblem,
        budgets: dict[str, float],
        plan: ProblemStructure | None,
        upper: float,
        minimum: dict[str, float],
        minimum_all_blocks: dict[str, float | None],
        states: tuple[int, int],
    ) -> SolveResult:
        """The result for a plan and what bounds the others; raises `NoPlanError` without a plan."""
        if plan is None:
            raise NoPlanError(
                f"no plan for {problem.name!r} was found within {self.options.time_limit_s:.0f} s; raise "
                "time_limit_s, or switch on the phases that are off"
            )
        evaluation = problem.evaluate(plan)
        bound = max(upper, evaluation.value)
        gap = relative_gap(evaluation.value - problem.least_value, bound - problem.least_value)
        optimal = gap <= self.options.gap
        if not optimal:
            self.warnings.append(f"a limit was hit: the plan is feasible, its gap is {gap:.2e}")
        self.seconds["total"] = time.perf_counter() - self.start
        result = SolveResult(
            plan=plan,
            objective=evaluation.value,
            bound=bound,
            gap=gap,
            status=SolveStatus.OPTIMAL if optimal else SolveStatus.LIMIT,
            budgets=budgets,
            costs=evaluation.costs,
            minimum=minimum,
            minimum_all_blocks=minimum_all_blocks,
            proof=self.proof if optimal else "",
            seconds=self.seconds,
            states_total=states[0],
            states_removed=states[1],
            warnings=tuple(self.warnings),
        )
        return replace(result, certificate=certify(problem, result))

    def _raise_infeasible(self, scaled: ScaledProblem) -> None:
        raise jointly_infeasible(scaled.problem, scaled.budgets, scaled.minimum)

    def solve_by_scip(self, problem: PruningProblem, budgets: dict[str, float], reason: str) -> SolveResult:
        """Without elimination: SCIP finds the smallest costs, then the optimum."""
        options = self.options
        minimum: dict[str, float] = {}
        all_blocks: dict[str, float | None] = {}
        start = None
        with self.phase("minimum"):
            for metric, budget in budgets.items():
                smallest = partial(
                    minimum_cost, problem, metric, time_limit_s=options.time_limit_s, isolate=options.isolate
                )
                minimum[metric], start = smallest()
                try:
                    all_blocks[metric] = smallest(remove_blocks=False)[0]
                except NoStructureError:
                    all_blocks[metric] = None
                if not within(budget, minimum[metric]):
                    raise infeasible(problem, metric, budget, minimum[metric])
        with self.phase("scip"):
            answer = prove(
                problem,
                budgets,
                value_unit=problem.most_value - problem.least_value or 1.0,
                gap=options.gap / 2,
                time_limit_s=max(self.deadline - time.perf_counter(), 1.0),
                formulation=options.formulation,
                isolate=options.isolate,
                start=start if len(budgets) == 1 else None,
            )
        self.warnings += [f"without elimination: {reason}", *answer.warnings]
        self.proof = f"scip/{answer.formulation.value}"
        if answer.plan is None and answer.finished:
            raise jointly_infeasible(problem, budgets, minimum)
        states = sum(len(d.options) for d in problem.dimensions) + 2 * len(problem.blocks)
        return self.certified(problem, budgets, answer.plan, answer.bound, minimum, all_blocks, (states, 0))
