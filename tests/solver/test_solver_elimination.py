"""Parts of the exact route against their definitions: elimination, max-marginals, dominance, packing, remainder."""

from __future__ import annotations

import numpy as np
import pytest

from mdp_mmdet3d.solver.dominance import best_row, thinned, undominated
from mdp_mmdet3d.solver.elimination import Elimination, central_variable
from mdp_mmdet3d.solver.graph import build_graph
from mdp_mmdet3d.solver.lagrangian import minimise_dual
from mdp_mmdet3d.solver.packing import Packing
from mdp_mmdet3d.solver.remainder import remainder

SEEDS = range(3000, 3040)


def graph_of(problem):
    return build_graph(problem, problem.metrics, 1.0, [1.0] * len(problem.metrics))


def weights_of(problem, seed):
    rng = np.random.default_rng(seed)
    return rng.random(len(problem.metrics)) * (rng.random(len(problem.metrics)) < 0.8)


@pytest.mark.parametrize("rooted", [True, False])
def test_elimination_finds_the_maximum_and_a_plan_that_reaches_it(rooted, random_problem, brute_force):
    for seed in SEEDS:
        problem = random_problem(seed)
        table, multipliers = brute_force(problem), weights_of(problem, seed)
        graph = graph_of(problem)
        sweep = Elimination(graph, central_variable(graph) if rooted else None).sweep_weighted(1.0, multipliers)
        best = (table.values - table.costs @ multipliers).max()
        offset = graph.offset_value - float(multipliers @ graph.offset_costs)
        assert sweep.total + offset == pytest.approx(best, rel=1e-9, abs=1e-12)
        found = problem.evaluate(graph.decode(sweep.assignment()))
        weighted = found.value - sum(m * c for m, c in zip(multipliers, found.costs.values()))
        assert weighted == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_max_marginals_are_the_best_plans_that_use_a_state(random_problem, brute_force):
    for seed in SEEDS:
        problem = random_problem(seed)
        table, multipliers = brute_force(problem), weights_of(problem, seed)
        graph = graph_of(problem)
        marginals = Elimination(graph).sweep_weighted(1.0, multipliers).state_marginals
        weighted = table.values - table.costs @ multipliers
        offset = graph.offset_value - float(multipliers @ graph.offset_costs)
        for d, dimension in enumerate(problem.dimensions):
            home = graph.homes[d]
            for state in range(len(dimension.options)):
                using = [
                    w
                    for w, plan in zip(weighted, table.plans)
                    if plan.options[d] == state and (home is None or plan.kept[home])
                ]
                if using and any(d in term.dimensions for term in problem.terms):
                    # A dimension without active terms stands at its last option in the table of canonical plans.
                    assert marginals[d][state] + offset >= max(using) - 1e-9 * abs(max(using))
            if home is None and all(t.block is None for t in problem.terms if d in t.dimensions):
                exact = [
                    max(w for w, p in zip(weighted, table.plans) if p.options[d] == s)
                    for s in sorted({p.options[d] for p in table.plans})
                ]
                if len(exact) == len(dimension.options):
                    assert (marginals[d] + offset).tolist() == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_the_lagrangian_bounds_every_plan_within_the_limits(random_problem, brute_force):
    for seed in SEEDS:
        problem = random_problem(seed)
        if seed % 5 > 2:
            continue  # numbers far from 1, which the route scales first
        table = brute_force(problem)
        graph = graph_of(problem)
        limits = np.median(table.costs, axis=0) - graph.offset_costs
        dual = minimise_dual(Elimination(graph), limits, [])
        within = (table.costs - graph.offset_costs <= limits).all(axis=1)
        if within.any():
            assert dual.bound + graph.offset_value >= table.values[within].max() - 1e-9
        if dual.incumbent is not None:
            value, costs = graph.measure(dual.incumbent)
            assert (costs <= limits).all() and value == pytest.approx(dual.value)


def test_locating_a_plan_inverts_decoding(random_problem, brute_force):
    for seed in SEEDS:
        problem = random_problem(seed)
        graph = graph_of(problem)
        packing = Packing(graph)
        table = brute_force(problem)
        previous = None
        order = sorted(range(len(table.plans)), key=lambda i: (table.plans[i].options, table.plans[i].kept))
        for index in order[:60]:
            plan = table.plans[index]
            assignment = graph.locate(plan)
            assert assignment is not None and graph.decode(assignment) == plan
            words = sum(packing.codes[v][position] for v, position in enumerate(assignment))
            assert packing.unpack(words) == plan
            assert previous is None or tuple(words) > previous
            previous = tuple(words)


def test_a_remainder_lifts_to_plans_of_equal_value(random_problem, brute_force):
    rng = np.random.default_rng(0)
    for seed in SEEDS:
        problem = random_problem(seed)
        graph = graph_of(problem)
        plan = brute_force(problem).plans[-1]
        kept_states = graph.locate(plan)
        keep = [(rng.random(size) < 0.6) | (np.arange(size) == state) for size, state in zip(graph.sizes, kept_states)]
        rest = remainder(graph.restrict(keep))
        assert rest.lift(rest.lower(plan)) == plan
        reduced = brute_force(rest.problem)
        for index in range(0, len(reduced.plans), 7):
            lifted = problem.evaluate(rest.lift(reduced.plans[index]))
            assert lifted.value == pytest.approx(reduced.values[index], rel=1e-12)
            assert list(lifted.costs.values()) == pytest.approx(reduced.costs[index].tolist(), rel=1e-12)


def naive_front(group, rows, metrics):
    def beats(a, b):
        if (
            group[a] != group[b]
            or rows[a, 0] < rows[b, 0]
            or (rows[a, 1 : 1 + metrics] > rows[b, 1 : 1 + metrics]).any()
        ):
            return False
        same = (rows[a, : 1 + metrics] == rows[b, : 1 + metrics]).all()
        return not same or tuple(rows[a, 1 + metrics :]) > tuple(rows[b, 1 + metrics :])

    return {b for b in range(len(rows)) if not any(beats(a, b) for a in range(len(rows)))}


@pytest.mark.parametrize("metrics", [1, 2])
def test_dominance_drops_only_what_another_label_beats(metrics):
    rng = np.random.default_rng(metrics)
    for _ in range(60):
        count = int(rng.integers(1, 80))
        group = rng.integers(0, 4, count)
        rows = rng.integers(0, 12, (count, 1 + metrics + 2))
        rows[:, -1] = rng.permutation(count)
        kept = set(undominated(group, rows, metrics).tolist())
        front = naive_front(group, rows, metrics)
        assert front <= kept
        if metrics == 1:
            assert kept == front


def test_best_row_and_thinning():
    rows = np.array([[5, 3, 9], [5, 2, 1], [5, 2, 4], [4, 1, 9]])
    assert best_row(rows, 1).tolist() == [5, 2, 4]
    assert best_row(rows[:0], 1) is None
    rng = np.random.default_rng(0)
    group, cost, badness = rng.integers(0, 5, 1000), rng.integers(0, 10**6, 1000), rng.random(1000)
    kept = thinned(group, cost, badness, 100)
    assert len(kept) <= 100 and set(group[kept]) == set(group)
    for g in range(5):
        assert badness[group == g].min() in badness[kept]
