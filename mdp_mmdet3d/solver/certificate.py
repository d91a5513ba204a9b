"""Checks of a result outside the solver: on the original tables, and by SCIP without any elimination."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.solver.problem import InvalidProblemError, PruningProblem
from mdp_mmdet3d.solver.proof import prove
from mdp_mmdet3d.solver.result import Formulation, SolveResult
from mdp_mmdet3d.solver.scaling import within

_SAME = 1e-9


class CertificateError(MdpError):
    """A result does not hold on the original tables: a bug, never the user's fault."""


def certify(problem: PruningProblem, result: SolveResult) -> dict[str, Any]:
    """Re-evaluate a result on the original tables.

    Args:
        problem: The problem it claims to solve.
        result: What `solve` returned.

    Returns:
        JSON-able: value, dense value and share kept, per metric cost, budget and slack, and what was checked.

    Raises:
        CertificateError: Value, costs, a budget, the bound, nesting or canonical form do not hold.
    """
    plan = result.plan
    try:
        evaluation = problem.evaluate(plan)
    except InvalidProblemError as error:
        raise CertificateError(f"the plan is no structure of {problem.name!r}: {error}") from error
    if problem.canonical(plan) != plan:
        raise CertificateError("the plan is not canonical: an option that only removed blocks use is not the last")
    _same("value", result.objective, evaluation.value)
    for metric, cost in evaluation.costs.items():
        _same(metric, result.costs[metric], cost)
    for metric, budget in result.budgets.items():
        if not within(budget, evaluation.costs[metric]):
            raise CertificateError(f"{metric} is {evaluation.costs[metric]!r}, over the budget of {budget!r}")
    if result.bound < evaluation.value - _SAME * abs(evaluation.value):
        raise CertificateError(f"the bound {result.bound!r} is below the plan's value {evaluation.value!r}")
    dense = problem.dense.value
    return {
        "checked": ["nesting", "canonical form", "value", "costs", "budgets", "bound"],
        "problem_sha256": problem_digest(problem),
        "value": evaluation.value,
        "dense_value": dense,
        "share_kept": evaluation.value / dense if dense else 1.0,
        "bound": result.bound,
        "proof": result.proof,
        "metrics": {
            metric: {"cost": evaluation.costs[metric], "budget": budget, "slack": budget - evaluation.costs[metric]}
            for metric, budget in result.budgets.items()
        },
    }


def audit(
    problem: PruningProblem, result: SolveResult, *, gap: float = 1e-6, time_limit_s: float = 3600.0
) -> dict[str, Any]:
    """Prove a result again: SCIP on the full linearised model, without elimination, reduction or labels.

    Args:
        problem: The problem it claims to solve.
        result: What `solve` returned.
        gap: Relative gap up to which a better plan may exist.
        time_limit_s: Limit for SCIP.

    Returns:
        JSON-able: ``confirmed`` (True, False, or None where the limit was hit first), bound, nodes, seconds,
        SCIP's version, warnings.
    """
    start = time.perf_counter()
    above = result.objective - problem.least_value
    proof = prove(
        problem,
        result.budgets,
        value_unit=above or 1.0,
        gap=gap / 2,
        time_limit_s=time_limit_s,
        formulation=Formulation.LINEARISED,
        start=result.plan,
    )
    better = proof.plan is not None and problem.evaluate(proof.plan).value > result.objective + gap * above
    closed = proof.bound <= result.objective + gap * above
    return {
        "confirmed": False if better else True if closed else None,
        "bound": proof.bound,
        "formulation": proof.formulation.value,
        "nodes": proof.nodes,
        "scip": proof.version,
        "seconds": time.perf_counter() - start,
        "warnings": list(proof.warnings),
    }


def problem_digest(problem: PruningProblem) -> str:
    """SHA-256 over everything that decides the answer."""
    state = hashlib.sha256()
    state.update(
        json.dumps(
            [
                problem.metrics,
                [d.options for d in problem.dimensions],
                [b.parent for b in problem.blocks],
                [(t.dimensions, t.block) for t in problem.terms],
            ]
        ).encode()
    )
    for term in problem.terms:
        for metric in problem.metrics:
            state.update(term.costs[metric].tobytes())
        state.update(b"" if term.value is None else term.value.tobytes())
    return state.hexdigest()


def _same(name: str, claimed: float, found: float) -> None:
    if abs(claimed - found) > _SAME * max(abs(claimed), abs(found)):
        raise CertificateError(f"{name} is claimed to be {claimed!r} but is {found!r} by the original tables")
