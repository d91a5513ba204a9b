"""SCIP proves what the other phases leave open, and answers its own crashes with the other formulation."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.solver.formulations import SCALE, ScipFormulation, folded, linearised
from mdp_mmdet3d.solver.problem import ProblemStructure, PruningProblem
from mdp_mmdet3d.solver.result import Formulation
from mdp_mmdet3d.solver.scaling import within
from mdp_mmdet3d.solver.scip import ScipAnswer, ScipCrashError, ScipStatus, run_scip

LARGEST_LINEARISED = 400_000
"""Joint options up to which the linearised model is chosen."""
_REJECTED_PLANS = 20


@dataclass(frozen=True)
class ScipProof:
    """What SCIP proved about a problem.

    Attributes:
        plan: Best plan within the budgets, None if none is better than the start.
        bound: No plan is worth more than this and the start.
        finished: The search ended by itself.
        formulation: Model that answered.
        version: SCIP's version.
        nodes: Branch-and-bound nodes.
        warnings: Crashes and limits.
    """

    plan: ProblemStructure | None
    bound: float
    finished: bool
    formulation: Formulation
    version: str
    nodes: int
    warnings: tuple[str, ...]


def prove(
    problem: PruningProblem,
    budgets: dict[str, float],
    *,
    value_unit: float,
    gap: float,
    time_limit_s: float,
    formulation: Formulation = Formulation.AUTO,
    isolate: bool = True,
    start: ProblemStructure | None = None,
    floor: float = float("-inf"),
) -> ScipProof:
    """Let SCIP find a plan that is better than ``start``, or prove that there is none.

    Args:
        problem: What may be chosen.
        budgets: Upper limit per metric.
        value_unit: About the optimum's value; scales the model.
        gap: Relative gap at which SCIP may stop.
        time_limit_s: Wall-clock limit for everything.
        formulation: Model to try first.
        isolate: Use child processes.
        start: Feasible plan.
        floor: Value below which plans are of no interest.

    Raises:
        ScipCrashError: Both formulations crashed.
    """
    deadline = time.perf_counter() + time_limit_s
    first = formulation
    if first is Formulation.AUTO:
        large = _joint_options(problem) > LARGEST_LINEARISED
        first = Formulation.FOLDED if large else Formulation.LINEARISED
    other = Formulation.LINEARISED if first is Formulation.FOLDED else Formulation.FOLDED
    warnings: list[str] = []
    floor = max(floor, problem.evaluate(start).value if start else -np.inf)
    for attempt in (first, other):
        build = linearised if attempt is Formulation.LINEARISED else folded
        form = build(problem, budgets, value_unit / SCALE, start)
        try:
            answer, plan = _feasible(problem, budgets, form, gap, deadline, isolate, floor)
        except ScipCrashError as error:
            warnings.append(f"{attempt.value} model: {error}")
            continue
        if answer.status is ScipStatus.LIMIT:
            warnings.append(f"SCIP stopped at its limit of {time_limit_s:.0f} s")
        bound = floor
        if answer.status is not ScipStatus.INFEASIBLE:
            bound = max(floor, answer.bound * form.value_unit + form.value_offset)
        return ScipProof(
            plan, bound, answer.status is not ScipStatus.LIMIT, attempt, answer.version, answer.nodes, tuple(warnings)
        )
    raise ScipCrashError("SCIP failed on both formulations. " + "; ".join(warnings))


def _feasible(
    problem: PruningProblem,
    budgets: dict[str, float],
    form: ScipFormulation,
    gap: float,
    deadline: float,
    isolate: bool,
    floor: float,
) -> tuple[ScipAnswer, ProblemStructure | None]:
    """SCIP's answer and a plan that keeps the budgets by the original tables.

    SCIP's tolerances may let a plan through that exceeds a budget by a hair: such a plan is cut off, and SCIP is
    asked again.
    """
    cutoff = None
    if floor > -np.inf:
        cutoff = (floor - form.value_offset) / form.value_unit
        cutoff -= 1e-9 * abs(cutoff)
    model = form.model
    for _ in range(_REJECTED_PLANS):
        remaining = max(deadline - time.perf_counter(), 1.0)
        answer = run_scip(model, time_limit_s=remaining, gap=gap, isolate=isolate, cutoff=cutoff)
        if answer.binaries is None:
            return answer, None
        plan = problem.canonical(form.decode(answer.binaries))
        if problem.allows(plan):
            costs = problem.evaluate(plan).costs
            if all(within(budget, costs[metric]) for metric, budget in budgets.items()):
                return answer, plan
        model = model.without(np.array(answer.binaries))
    raise MdpError(f"SCIP's first {_REJECTED_PLANS} plans all exceed a budget of {budgets} by its tolerance")


def _joint_options(problem: PruningProblem) -> int:
    return sum(
        int(np.prod([len(problem.dimensions[d].options) for d in term.dimensions]))
        for term in problem.terms
        if len(term.dimensions) > 1
    )
