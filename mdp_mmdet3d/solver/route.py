"""`solve`: the exact route from a problem and budgets to a certified plan."""
from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from mdp_mmdet3d.errors import InfeasibleBudgetError, MdpError
from mdp_mmdet3d.solver.elimination import Elimination
from mdp_mmdet3d.solver.formulations import SCALE, folded, linearised
from mdp_mmdet3d.solver.graph import build_graph
from mdp_mmdet3d.solver.problem import PlanIndices, PruningProblem
from mdp_mmdet3d.solver.result import (
    FEASIBILITY_TOLERANCE,
    Formulation,
    SolveOptions,
    SolveResult,
    SolveStatus,
    relative_gap,
)
from mdp_mmdet3d.solver.scip import ScipStatus, run_scip


class NoPlanError(MdpError):
    """A limit was hit before any plan was found."""


class Clock:
    """Adds up wall-clock seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book the time of the block under ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start


def minimum_cost(problem: PruningProblem, metric: str) -> tuple[float, PlanIndices]:
    """Smallest reachable cost of one metric and a plan that reaches it, exact."""
    unit = max(float(term.costs[metric].max()) for term in problem.terms) or 1.0
    graph = build_graph(problem, [metric], 1.0, [unit])
    elimination = Elimination(graph)
    forbidden = [np.minimum(factor.value, 0.0) for factor in graph.factors]
    elimination.maximise([f - factor.costs[0] for f, factor in zip(forbidden, graph.factors)])
    plan = graph.decode(elimination.best_assignment())
    return problem.evaluate(plan).costs[metric], plan


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


def solve(problem: PruningProblem, budgets: Mapping[str, float],
          options: SolveOptions | None = None) -> SolveResult:
    """Choose the most valuable structure within the budgets, with proof (METHOD.md, sections 2 and 5).

    Args:
        problem: What may be chosen.
        budgets: Upper limit per metric in the metric's unit, e.g. ``{"latency_ms": 120.0}``.
        options: Tolerance, limits, phases.

    Raises:
        InfeasibleBudgetError: No plan keeps the budgets; the message tells the smallest reachable cost.
        NoPlanError: The time limit passed without any plan.
        MdpError: A budget has an unknown name or is no number.
    """
    options = options or SolveOptions()
    budgets = check_budgets(problem, budgets)
    clock = Clock()
    with clock.phase("minimum"):
        minimum = {}
        for metric, budget in budgets.items():
            minimum[metric], cheapest = minimum_cost(problem, metric)
            if not within(budget, minimum[metric]):
                raise infeasible(problem, metric, budget, minimum[metric])
    start = cheapest if len(budgets) == 1 else None
    with clock.phase("scip"):
        plan, bound, proof, warnings = _scip(problem, budgets, options, start, minimum)
    evaluation = problem.evaluate(plan)
    for metric, budget in budgets.items():
        if not within(budget, evaluation.costs[metric]):
            cost = evaluation.costs[metric]
            raise MdpError(f"internal error: the plan's {metric} is {cost!r}, over the budget of {budget!r}")
    gap = relative_gap(evaluation.value, bound)
    clock.seconds["total"] = clock.total()
    return SolveResult(
        plan=plan,
        objective=evaluation.value,
        bound=max(bound, evaluation.value),
        gap=gap,
        status=SolveStatus.OPTIMAL if gap <= options.gap else SolveStatus.TIME_LIMIT,
        budgets=budgets,
        costs=evaluation.costs,
        minimum=minimum,
        proof=proof,
        seconds=clock.seconds,
        warnings=warnings,
    )


def infeasible(problem: PruningProblem, metric: str, budget: float, minimum: float) -> InfeasibleBudgetError:
    """The error for a budget below the smallest reachable cost."""
    return InfeasibleBudgetError(
        f"budget of {budget:.6g} for {metric!r} cannot be reached by {problem.name!r}: the cheapest allowed "
        f"structure takes {minimum:.6g}. Raise the budget to {minimum:.6g} or allow more to be pruned.",
        minimum,
    )


def _scip(
    problem: PruningProblem, budgets: dict[str, float], options: SolveOptions, start: PlanIndices | None,
    minimum: dict[str, float],
) -> tuple[PlanIndices, float, str, tuple[str, ...]]:
    linear = options.formulation is not Formulation.FOLDED
    build = linearised if linear else folded
    unit = (problem.dense.value or 1.0) / SCALE
    form = build(problem, budgets, unit, start)
    answer = run_scip(form.model, time_limit_s=options.time_limit_s, gap=options.gap / 2,
                      isolate=options.isolate)
    if answer.status is ScipStatus.INFEASIBLE:
        raise InfeasibleBudgetError(
            f"no structure of {problem.name!r} keeps the budgets {budgets} at once, although each alone can "
            "be reached. Raise one of them.", next(iter(minimum.values())))
    if answer.binaries is None:
        raise NoPlanError(f"SCIP found no plan in {options.time_limit_s:.0f} s; raise time_limit_s")
    warnings: tuple[str, ...] = ()
    if answer.status is ScipStatus.LIMIT:
        warnings = (f"SCIP stopped at its limit of {options.time_limit_s:.0f} s",)
    plan = problem.canonical(form.decode(answer.binaries))
    bound = answer.bound * form.value_unit + form.value_offset
    return plan, bound, "scip/linearised" if linear else "scip/folded", warnings
