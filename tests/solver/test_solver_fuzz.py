"""The solver against exhaustive search, with every combination of phases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mdp_mmdet3d.errors import InfeasibleBudgetError
from mdp_mmdet3d.solver import Formulation, SolveOptions, SolveStatus, solve

SWITCHES = list(itertools.product((True, False), repeat=3))
BUDGET_SHARES = (0.0, 0.15, 0.4, 0.7, 1.0)


def budgets_of(problem, table, seed):
    """Limits between the smallest and the largest cost; a budget of a plan's exact cost now and then."""
    rng = np.random.default_rng(seed + 10**6)
    budgets = {}
    for column, metric in enumerate(problem.metrics):
        low, high = table.costs[:, column].min(), table.costs[:, column].max()
        share = rng.choice(BUDGET_SHARES)
        budgets[metric] = float(low + share * (high - low))
        if rng.random() < 0.3:
            budgets[metric] = float(rng.choice(table.costs[:, column]))
        if rng.random() < 0.05:
            budgets[metric] = float(low * 0.9)
    return budgets


def check(problem, table, budgets, options, exact_plan):
    limits = {column: budgets[metric] for column, metric in enumerate(problem.metrics)}
    expected = table.best(limits)
    if expected is None:
        with pytest.raises(InfeasibleBudgetError):
            solve(problem, budgets, options)
        return
    result = solve(problem, budgets, options)
    assert result.status is SolveStatus.OPTIMAL
    assert result.objective == pytest.approx(table.values[expected], rel=2e-6, abs=0)
    assert result.bound >= table.values[expected] * (1 - 1e-9)
    for column, metric in enumerate(problem.metrics):
        assert result.costs[metric] <= budgets[metric] * (1 + 1e-9)
        assert result.minimum[metric] == pytest.approx(table.costs[:, column].min(), rel=1e-9)
    assert problem.canonical(result.plan) == result.plan
    if exact_plan:
        assert result.plan == table.plans[expected]


@pytest.mark.parametrize("batch", range(20))
def test_labels_find_the_very_plan_of_the_exhaustive_search(batch, random_problem, brute_force):
    for seed in range(batch * 30, batch * 30 + 30):
        problem = random_problem(seed)
        table = brute_force(problem)
        check(problem, table, budgets_of(problem, table, seed), SolveOptions(), exact_plan=True)


@pytest.mark.parametrize("lagrangian,reduction,labels", SWITCHES)
def test_every_combination_of_phases_gives_the_same_objective(
    lagrangian, reduction, labels, random_problem, brute_force
):
    options = SolveOptions(lagrangian=lagrangian, reduction=reduction, label_search=labels, isolate=False)
    for seed in range(1000, 1040):
        problem = random_problem(seed)
        table = brute_force(problem)
        check(problem, table, budgets_of(problem, table, seed), options, exact_plan=labels)


@pytest.mark.parametrize("formulation", [Formulation.LINEARISED, Formulation.FOLDED])
def test_scip_alone_solves_every_formulation(formulation, random_problem, brute_force):
    options = SolveOptions(
        lagrangian=False, reduction=False, label_search=False, isolate=False, formulation=formulation
    )
    for seed in range(2000, 2040):
        problem = random_problem(seed)
        table = brute_force(problem)
        check(problem, table, budgets_of(problem, table, seed), options, exact_plan=False)
