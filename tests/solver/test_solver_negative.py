"""Values below 0, such as those of whole layers that hardly count: against exhaustive search, by every route."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mdp_mmdet3d.errors import InfeasibleBudgetError
from mdp_mmdet3d.solver import (
    Formulation,
    ProblemBlock,
    ProblemDimension,
    ProblemTerm,
    PruningProblem,
    SolveOptions,
    SolveStatus,
    elimination,
    solve,
)
from mdp_mmdet3d.solver.certificate import audit

from .routes import SCIP_ALONE


def with_negative_values(problem, seed):
    """A value of its own for every block, often below 0, and now and then a table with some entries below 0."""
    rng = np.random.default_rng(seed + 7 * 10**6)
    terms = list(problem.terms)
    largest = max((float(t.value.max()) for t in terms if t.value is not None), default=0.0) or 1.0
    for i, term in enumerate(terms):
        if term.value is not None and rng.random() < 0.2:
            terms[i] = replace(term, value=term.value - rng.choice([0.5, 1.0, 2.0]) * largest)
    free = {metric: np.zeros(()) for metric in problem.metrics}
    for block in range(len(problem.blocks)):
        value = np.array(rng.integers(-3, 2) * largest * rng.choice([1.0, rng.random()]))
        terms.append(ProblemTerm(f"whole {block}", (), block, free, value))
    return replace(problem, terms=tuple(terms))


def check(problem, table, seed, options, exact_plan):
    rng = np.random.default_rng(seed)
    costs = table.costs[:, 0]
    budget = float(rng.choice([costs.min(), costs.max(), rng.choice(costs), rng.uniform(costs.min(), costs.max())]))
    limits = {problem.metrics[0]: budget}
    best = table.best({0: budget})
    result = solve(problem, limits, options)
    assert result.status is SolveStatus.OPTIMAL
    span = table.values[best] - problem.least_value
    assert result.objective == pytest.approx(table.values[best], rel=1e-12, abs=2e-6 * span)
    assert result.bound >= table.values[best] - 1e-9 * span
    assert problem.canonical(result.plan) == result.plan
    if exact_plan:
        assert result.plan == table.plans[best]
    return result


def problems(seeds, random_problem, brute_force):
    for seed in seeds:
        problem = with_negative_values(random_problem(seed), seed)
        yield seed, problem, brute_force(problem)


@pytest.mark.parametrize("batch", range(8))
def test_labels_find_the_very_plan(batch, random_problem, brute_force):
    below = 0
    for seed, problem, table in problems(range(batch * 40, batch * 40 + 40), random_problem, brute_force):
        below += check(problem, table, seed, SolveOptions(), exact_plan=True).objective < 0
        assert problem.least_value <= table.values.min() + 1e-9 * abs(table.values.min())
    assert below > 0  # optima below 0 are among them


@pytest.mark.parametrize("formulation", [Formulation.LINEARISED, Formulation.FOLDED])
def test_scip_alone_agrees(formulation, random_problem, brute_force):
    options = replace(SCIP_ALONE, formulation=formulation)
    for seed, problem, table in problems(range(3000, 3030), random_problem, brute_force):
        check(problem, table, seed, options, exact_plan=False)


def test_without_elimination_and_in_the_audit(monkeypatch, random_problem, brute_force):
    for seed, problem, table in problems(range(4000, 4010), random_problem, brute_force):
        result = check(problem, table, seed, SolveOptions(isolate=False), exact_plan=True)
        assert audit(problem, result)["confirmed"] is True
        worse = replace(result, objective=table.values.min() - 1.0, plan=table.plans[int(table.values.argmin())])
        assert audit(problem, worse)["confirmed"] is not True
        with monkeypatch.context() as patch:
            patch.setattr(elimination, "LARGEST_TABLES", 0)
            check(problem, table, seed, SolveOptions(isolate=False), exact_plan=False)


def test_what_is_worth_less_than_nothing_goes():
    """A layer that costs less than the sum of its parts: it goes although each part by itself is worth keeping."""
    costs = {"latency_ms": np.array([1.0, 2.0])}
    problem = PruningProblem(
        "layer",
        ("latency_ms",),
        (ProblemDimension("width", (8, 16)),),
        (ProblemBlock("layer"), ProblemBlock("part", 0)),
        (
            ProblemTerm("part", (0,), 1, costs, np.array([0.1, 0.2])),
            ProblemTerm("whole", (), 0, {"latency_ms": np.zeros(())}, np.array(-0.3)),
            ProblemTerm("rest", (), None, {"latency_ms": np.ones(())}, np.array(1.0)),
        ),
    )
    result = solve(problem, {"latency_ms": 3.0})
    assert result.plan.kept == (False, False) and result.objective == 1.0
    assert result.gap == 0.0 and result.certificate["share_kept"] == pytest.approx(1.0 / 0.9)
    with pytest.raises(InfeasibleBudgetError):
        solve(problem, {"latency_ms": 0.5})
