"""SCIP: formulations, the child process, crashes, limits; and the route where elimination is out of reach."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from mdp_mmdet3d.errors import InfeasibleBudgetError, MdpError
from mdp_mmdet3d.solver import (
    Formulation,
    ProblemDimension,
    ProblemTerm,
    PruningProblem,
    SolveOptions,
    SolveStatus,
    elimination,
    proof,
    scip,
    solve,
)
from mdp_mmdet3d.solver.certificate import CertificateError, audit, certify
from mdp_mmdet3d.solver.scaling import minimum_cost

SCIP_ONLY = dict(lagrangian=False, reduction=False, label_search=False)


@pytest.fixture
def wide(monkeypatch):
    """Elimination is out of reach for every problem."""
    monkeypatch.setattr(elimination, "LARGEST_TABLES", 0)


@pytest.fixture
def example(random_problem):
    return random_problem(1006)


@pytest.fixture
def chain():
    """A problem whose Lagrangian bound leaves a gap, so that SCIP has something to do, and a budget."""
    rng = np.random.default_rng(1)
    dimensions = tuple(ProblemDimension(f"d{i}", (1, 2, 3, 4)) for i in range(12))
    terms = tuple(
        ProblemTerm(f"t{i}", (i, i + 1), None, {"latency_ms": rng.random((4, 4))}, rng.random((4, 4)))
        for i in range(11)
    )
    problem = PruningProblem("chain", ("latency_ms",), dimensions, (), terms)
    smallest, _ = minimum_cost(problem, "latency_ms")
    return problem, {"latency_ms": 0.5 * (smallest + problem.dense.costs["latency_ms"])}


def halfway(problem, table):
    return {
        metric: float(table.costs[:, i].min() + table.costs[:, i].max()) / 2 for i, metric in enumerate(problem.metrics)
    }


def test_the_child_process_answers_as_this_one(example, brute_force):
    budgets = halfway(example, brute_force(example))
    answers = [solve(example, budgets, SolveOptions(**SCIP_ONLY, isolate=isolate)) for isolate in (True, False)]
    assert answers[0].plan == answers[1].plan
    assert answers[0].proof == "scip/linearised"


def test_a_crash_is_reported_and_answered_with_the_other_formulation(example, brute_force, monkeypatch):
    budgets = halfway(example, brute_force(example))
    calls = []

    def crashing(model, **kwargs):
        calls.append(len(model.q_rows))
        if len(calls) == 1:
            raise scip.ScipCrashError("aborted")
        return scip.run_in_process(
            model, time_limit_s=kwargs["time_limit_s"], gap=kwargs["gap"], cutoff=kwargs["cutoff"]
        )

    monkeypatch.setattr(proof, "run_scip", crashing)
    result = solve(example, budgets, SolveOptions(**SCIP_ONLY))
    assert result.status is SolveStatus.OPTIMAL
    assert result.proof == "scip/folded"
    assert any("aborted" in warning for warning in result.warnings)
    assert result.objective == pytest.approx(solve(example, budgets).objective, rel=1e-6)


def test_a_child_that_dies_raises(chain, monkeypatch):
    monkeypatch.setattr(scip.sys, "executable", "/bin/false")
    with pytest.raises(MdpError, match="status 1"):
        solve(*chain, SolveOptions(**SCIP_ONLY))


def test_a_child_that_hangs_is_killed(chain, monkeypatch):
    real = subprocess.run

    def hanging(command, **kwargs):
        return real(["sleep", "60"], **{**kwargs, "timeout": 0.2})

    monkeypatch.setattr(scip.subprocess, "run", hanging)
    with pytest.raises(scip.ScipCrashError, match="killed"):
        solve(*chain, SolveOptions(**SCIP_ONLY))


def test_without_elimination_scip_finds_minimum_and_optimum(wide, random_problem, brute_force):
    for seed in range(1100, 1125):
        problem = random_problem(seed)
        table = brute_force(problem)
        budgets = halfway(problem, table)
        best = table.best({i: budgets[m] for i, m in enumerate(problem.metrics)})
        options = SolveOptions(isolate=False)
        if best is None:
            with pytest.raises(InfeasibleBudgetError):
                solve(problem, budgets, options)
            continue
        result = solve(problem, budgets, options)
        assert result.objective == pytest.approx(table.values[best], rel=2e-6)
        assert any("without elimination" in warning for warning in result.warnings)
        everything = [all(plan.kept) for plan in table.plans]
        for i, metric in enumerate(problem.metrics):
            assert result.minimum[metric] == pytest.approx(table.costs[:, i].min(), rel=1e-6, abs=1e-18)
            assert result.minimum_all_blocks[metric] == pytest.approx(
                table.costs[everything, i].min(), rel=1e-6, abs=1e-18
            )


def test_minimum_with_and_without_block_removal(random_problem, brute_force):
    for seed in range(1200, 1250):
        problem = random_problem(seed)
        table = brute_force(problem)
        everything = [all(plan.kept) for plan in table.plans]
        for i, metric in enumerate(problem.metrics):
            assert minimum_cost(problem, metric)[0] == pytest.approx(table.costs[:, i].min(), rel=1e-12)
            assert minimum_cost(problem, metric, remove_blocks=False)[0] == pytest.approx(
                table.costs[everything, i].min(), rel=1e-12
            )


def test_audit_confirms_and_refutes(random_problem, brute_force):
    refuted = 0
    for seed in (1301, 1302, 1305, 1307):
        problem = random_problem(seed)
        table = brute_force(problem)
        budgets = halfway(problem, table)
        try:
            result = solve(problem, budgets)
        except InfeasibleBudgetError:
            continue
        assert audit(problem, result)["confirmed"] is True
        limits = {i: budgets[m] for i, m in enumerate(problem.metrics)}
        within = [i for i in range(len(table.plans)) if all(table.costs[i, m] <= b for m, b in limits.items())]
        worse = min(within, key=lambda i: table.values[i])
        if table.values[worse] < result.objective * 0.99:
            evaluation = problem.evaluate(table.plans[worse])
            fake = type(result)(
                **{**vars(result), "plan": table.plans[worse], "objective": evaluation.value, "costs": evaluation.costs}
            )
            assert audit(problem, fake)["confirmed"] is False
            refuted += 1
    assert refuted


def test_certify_refuses_what_does_not_hold(example, brute_force):
    budgets = halfway(example, brute_force(example))
    result = solve(example, budgets)
    assert certify(example, result)["value"] == result.objective
    metric = example.metrics[0]
    lies = [
        {"objective": result.objective * 1.001},
        {"bound": result.objective * 0.9},
        {"costs": {**result.costs, metric: result.costs[metric] * 0.9}},
        {"budgets": {metric: result.costs[metric] * (1 - 1e-6)}},
    ]
    for lie in lies:
        with pytest.raises(CertificateError):
            certify(example, type(result)(**{**vars(result), **lie}))


def test_a_limit_is_a_warning_with_its_gap(chain):
    problem, budget = chain
    result = solve(problem, budget, SolveOptions(scip=False, label_search=False))
    best = solve(problem, budget)
    assert result.status is SolveStatus.LIMIT and result.gap > 1e-6
    assert any("limit" in warning for warning in result.warnings) and not result.proof
    assert result.objective <= best.objective <= result.bound
    assert best.status is SolveStatus.OPTIMAL and best.gap == 0


@pytest.mark.parametrize("formulation", list(Formulation))
def test_impossible_budget_tells_the_smallest_cost(formulation, chain):
    problem, _ = chain
    smallest, plan = minimum_cost(problem, "latency_ms")
    with pytest.raises(InfeasibleBudgetError, match=f"{smallest:.4g}"[:4]) as caught:
        solve(problem, {"latency_ms": smallest * 0.99}, SolveOptions(formulation=formulation))
    assert caught.value.minimum == pytest.approx(smallest)
    assert solve(problem, {"latency_ms": smallest}, SolveOptions(formulation=formulation)).plan == plan


@pytest.mark.parametrize(
    "budgets,words",
    [
        ({}, "no budget"),
        ({"latency_msec": 1.0}, "latency_msec"),
        ({"latency_ms": float("nan")}, "nan"),
        ({"latency_ms": -1.0}, "-1.0"),
    ],
)
def test_bad_budgets_are_refused(budgets, words, example):
    with pytest.raises(MdpError, match=words):
        solve(example, budgets)
