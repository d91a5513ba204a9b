"""Global dimensions against exhaustive search, every route by itself; ties, limits and what the report says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mdp_mmdet3d.errors import InfeasibleBudgetError, MdpError
from mdp_mmdet3d.solver import (
    InvalidProblemError,
    ProblemDimension,
    ProblemStructure,
    ProblemTerm,
    PruningProblem,
    SolveOptions,
    SolveStatus,
    elimination,
    solve,
)
from mdp_mmdet3d.solver.certificate import audit
from mdp_mmdet3d.solver.conditioning import condition, conditions
from mdp_mmdet3d.solver.pareto import pareto
from mdp_mmdet3d.solver.scaling import minimum_cost

from .routes import ROUTES


@pytest.mark.parametrize("batch", range(10))
def test_labels_find_the_very_plan(batch, global_problem, brute_force, against_oracle):
    solved = dropped = 0
    for seed in range(batch * 40, batch * 40 + 40):
        problem = global_problem(seed)
        result = against_oracle(problem, brute_force(problem), seed, ROUTES["all"], exact_plan=True)
        if result is not None:
            found = result.combinations
            assert found.total == np.prod([len(problem.dimensions[d].options) for d in problem.global_dimensions])
            assert found.total == found.infeasible + found.dropped + found.solved and found.open == 0
            solved += 1
            dropped += found.dropped
    assert solved > 15 and dropped > 0


@pytest.mark.parametrize("route", list(ROUTES)[1:])
def test_every_route_by_itself(route, global_problem, brute_force, against_oracle):
    for seed in range(1000, 1030):
        problem = global_problem(seed)
        table = brute_force(problem)
        against_oracle(problem, table, seed, ROUTES[route], exact_plan=route.startswith("labels"))


def test_without_elimination(monkeypatch, global_problem, brute_force, against_oracle):
    monkeypatch.setattr(elimination, "LARGEST_TABLES", 0)
    for seed in range(1100, 1115):
        problem = global_problem(seed)
        table = brute_force(problem)
        if table.plans:
            against_oracle(problem, table, seed, SolveOptions(isolate=False), exact_plan=False)


def test_the_audit_solves_the_whole_problem_at_once(global_problem, brute_force, against_oracle):
    audited = 0
    for seed in range(1200, 1240):
        problem = global_problem(seed)
        result = against_oracle(problem, brute_force(problem), seed, ROUTES["all"], exact_plan=True)
        if result is not None and audited < 6:
            assert audit(problem, result)["confirmed"] is True
            audited += 1
    assert audited == 6


def test_a_conditioned_problem_values_plans_as_the_whole_one(global_problem):
    for seed in range(1300, 1320):
        problem = global_problem(seed)
        rng = np.random.default_rng(seed)
        for case in conditions(problem):
            plan = ProblemStructure(tuple(int(rng.integers(len(d.options))) for d in case.problem.dimensions),
                               (True,) * len(problem.blocks))  # fmt: skip
            if case.problem.allows(plan):
                lifted = case.lift(plan)
                assert problem.evaluate(lifted) == case.problem.evaluate(plan)
                assert case.problem.canonical(case.lower(lifted)) == case.problem.canonical(plan)


def test_minimum_and_pareto(global_problem, brute_force):
    fronts = 0
    for seed in range(1400, 1440):
        problem = global_problem(seed)
        table = brute_force(problem)
        if not table.plans:
            continue
        for column, metric in enumerate(problem.metrics):
            cost, plan = minimum_cost(problem, metric)
            assert cost == pytest.approx(table.costs[:, column].min(), rel=1e-12) and plan in table.plans
        if len(problem.metrics) == 1 and fronts < 5 and problem.allows(problem.dense_plan):
            fronts += 1
            for point in pareto(problem, 8).points:
                best = table.best({0: point.costs[problem.metrics[0]]})
                assert point.objective == pytest.approx(table.values[best], rel=1e-9, abs=1e-12)
    assert fronts == 5


def flat(options=(1, 2, 3)):
    """Every plan is worth the same, and the larger width is not more expensive."""
    dimensions = (ProblemDimension("a", (1, 2)), ProblemDimension("width", options), ProblemDimension("b", (1, 2)))
    shape = (2, len(options), 2)
    term = ProblemTerm("t", (0, 1, 2), None, {"ms": np.ones(shape)}, np.ones(shape))
    return PruningProblem("flat", ("ms",), dimensions, (), (term,), (1,))


def test_ties_between_combinations_go_to_the_larger_plan():
    assert solve(flat(), {"ms": 1.0}).plan == ProblemStructure((1, 2, 1), ())
    cheaper = replace(flat().terms[0], costs={"ms": np.ones((2, 3, 2)) - 0.25 * (np.arange(3) == 1)[None, :, None]})
    assert solve(replace(flat(), terms=(cheaper,)), {"ms": 1.0}).plan == ProblemStructure((1, 1, 1), ())


def chain(widths=6, count=14, seed=0):
    """Layers that all depend on one width; the Lagrangian bound leaves a gap."""
    rng = np.random.default_rng(seed)
    dimensions = (*(ProblemDimension(f"d{i}", (1, 2, 3, 4)) for i in range(count)),
                  ProblemDimension("width", tuple(range(1, widths + 1))))  # fmt: skip
    share = np.linspace(0.5, 1.0, widths)

    def table(power):
        return rng.random((4, 4))[..., None] * share**power

    terms = tuple(
        ProblemTerm(f"t{i}", (i, i + 1, count), None, {"ms": table(1.0)}, table(0.9)) for i in range(count - 1)
    )
    return PruningProblem("chain", ("ms",), dimensions, (), terms, (count,))


def test_hopeless_combinations_are_dropped_and_the_report_counts_them():
    problem = chain()
    budget = {"ms": 0.5 * problem.dense.costs["ms"]}
    result = solve(problem, budget)
    cases = [solve(case.problem, budget).objective for case in conditions(problem)]
    assert result.objective == pytest.approx(max(cases), rel=1e-12) and result.gap == 0.0
    found = result.combinations
    assert found.total == 6 and found.dropped >= 2 and found.open == 0
    assert result.to_json()["combinations"]["dropped"] == found.dropped
    assert result.proof.startswith("bounds of 6 combinations, ")


def test_a_limit_leaves_a_plan_with_its_gap():
    problem = chain(count=30)
    budget = {"ms": 0.5 * problem.dense.costs["ms"]}
    best = solve(problem, budget)
    assert best.status is SolveStatus.OPTIMAL
    for options in (SolveOptions(label_search=False, scip=False), SolveOptions(time_limit_s=0.0)):
        result = solve(problem, budget, options)
        assert result.status is SolveStatus.LIMIT and result.gap > 1e-6
        assert result.objective <= best.objective * (1 + 1e-12) and best.objective <= result.bound * (1 + 1e-12)
        assert any("limit" in warning for warning in result.warnings) and not result.proof
    assert result.combinations.open > 0


def test_an_impossible_budget_tells_the_smallest_cost_of_all_combinations():
    problem = chain()
    smallest, plan = minimum_cost(problem, "ms")
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(problem, {"ms": 0.99 * smallest})
    assert caught.value.minimum == pytest.approx(smallest)
    assert solve(problem, {"ms": smallest}).plan == plan
    with pytest.raises(MdpError, match="params"):
        solve(problem, {"params": 1.0})


def test_a_term_takes_three_dimensions_besides_the_global_ones():
    options = (ProblemDimension(name, (1, 2)) for name in "abcde")
    term = ProblemTerm("t", (0, 1, 2, 3), None, {"ms": np.ones((2, 2, 2, 2))})
    problem = PruningProblem("p", ("ms",), tuple(options), (), (term,), (1,))
    assert condition(problem, (0,)).problem.terms[0].dimensions == (0, 1, 2)
    with pytest.raises(InvalidProblemError, match="three distinct dimensions that are not global"):
        replace(problem, global_dimensions=(4,))
    with pytest.raises(InvalidProblemError, match="global dimension 7"):
        replace(problem, global_dimensions=(1, 7))
    with pytest.raises(InvalidProblemError, match="not distinct"):
        replace(problem, global_dimensions=(1, 1))
