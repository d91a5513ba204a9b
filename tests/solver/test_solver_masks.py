"""Masks, terms of removed blocks and their permutations against exhaustive search, every route by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mdp_mmdet3d.errors import InfeasibleBudgetError
from mdp_mmdet3d.solver import (
    InvalidProblemError,
    ProblemBlock,
    ProblemDimension,
    ProblemStructure,
    ProblemTerm,
    PruningProblem,
    SolveOptions,
    elimination,
    solve,
)
from mdp_mmdet3d.solver.certificate import CertificateError, audit, certify, problem_digest
from mdp_mmdet3d.solver.pareto import pareto
from mdp_mmdet3d.solver.scaling import NoStructureError, minimum_cost

from ..data_files import data_path
from .routes import ROUTES


@pytest.mark.parametrize("batch", range(10))
def test_labels_find_the_very_plan(batch, masked_problem, brute_force, against_oracle):
    solved = excluded = 0
    for seed in range(batch * 40, batch * 40 + 40):
        problem = masked_problem(seed)
        table = brute_force(problem)
        solved += against_oracle(problem, table, seed, ROUTES["all"], exact_plan=True) is not None
        excluded += not table.plans
    assert solved > 15 and excluded


@pytest.mark.parametrize("route", list(ROUTES)[1:])
def test_every_route_by_itself(route, masked_problem, brute_force, against_oracle):
    for seed in range(1000, 1030):
        problem = masked_problem(seed)
        against_oracle(problem, brute_force(problem), seed, ROUTES[route], exact_plan=route.startswith("labels"))


def test_without_elimination(monkeypatch, masked_problem, brute_force, against_oracle):
    monkeypatch.setattr(elimination, "LARGEST_TABLES", 0)
    for seed in range(1100, 1120):
        problem = masked_problem(seed)
        table = brute_force(problem)
        if table.plans:
            against_oracle(problem, table, seed, SolveOptions(isolate=False), exact_plan=False)
        else:
            with pytest.raises(NoStructureError):
                solve(problem, dict.fromkeys(problem.metrics, 1.0), SolveOptions(isolate=False))


def test_audit_and_certificate_know_masks(masked_problem, brute_force, budgets_of):
    audited = refused = 0
    for seed in range(1200, 1260):
        problem = masked_problem(seed)
        table = brute_force(problem)
        if not table.plans or table.best(dict(enumerate(budgets_of(problem, table, seed).values()))) is None:
            continue
        result = solve(problem, budgets_of(problem, table, seed))
        if audited < 6:
            assert audit(problem, result)["confirmed"] is True
            audited += 1
        for option in np.ndindex(*(len(d.options) for d in problem.dimensions)):
            plan = ProblemStructure(option, result.plan.kept)
            if not problem.allows(plan):
                with pytest.raises(CertificateError, match="does not allow"):
                    certify(problem, replace(result, plan=plan))
                refused += 1
                break
    assert audited == 6 and refused > 10


def permuted(problem, rng):
    """The same problem with dimensions, axes, blocks, terms in another order, and the map of plans."""
    order = rng.permutation(len(problem.dimensions))
    place = {int(old): new for new, old in enumerate(order)}
    blocks = rng.permutation(len(problem.blocks))
    block_place = {int(old): new for new, old in enumerate(blocks)}
    terms = []
    for index in rng.permutation(len(problem.terms)):
        term = problem.terms[index]
        axes = rng.permutation(len(term.dimensions))

        def turned(array, axes=axes):
            return None if array is None else array.transpose(axes)

        terms.append(
            replace(
                term,
                dimensions=tuple(place[term.dimensions[a]] for a in axes),
                block=None if term.block is None else block_place[term.block],
                costs={metric: turned(cost) for metric, cost in term.costs.items()},
                value=turned(term.value),
                allowed=turned(term.allowed),
            )
        )
    parents = [problem.blocks[b] for b in blocks]
    other = replace(
        problem,
        dimensions=tuple(problem.dimensions[d] for d in order),
        blocks=tuple(replace(b, parent=None if b.parent is None else block_place[b.parent]) for b in parents),
        terms=tuple(terms),
        global_dimensions=tuple(place[d] for d in problem.global_dimensions),
    )
    return other


@pytest.mark.parametrize("kind", ["masked_problem", "global_problem"])
def test_order_does_not_matter(kind, request, brute_force, budgets_of):
    make = request.getfixturevalue(kind)
    compared = 0
    for seed in range(1300, 1340):
        problem = make(seed)
        table = brute_force(problem)
        other = permuted(problem, np.random.default_rng(seed))
        answers = []
        for one in (problem, other):
            try:
                budgets = budgets_of(problem, table, seed) if table.plans else dict.fromkeys(problem.metrics, 1.0)
                result = solve(one, budgets, SolveOptions(isolate=False))
                costs = [result.costs[m] for m in problem.metrics]
                answers.append((result.objective, *costs))
            except (InfeasibleBudgetError, NoStructureError) as error:
                answers.append(type(error))
        if isinstance(answers[0], tuple):
            compared += 1
            assert answers[0] == pytest.approx(answers[1], rel=1e-11)
        else:
            assert answers[0] is answers[1]
    assert compared > 15


def test_minimum_and_pareto(masked_problem, brute_force):
    fronts = 0
    for seed in range(1400, 1440):
        problem = masked_problem(seed)
        table = brute_force(problem)
        if not table.plans:
            with pytest.raises(NoStructureError):
                minimum_cost(problem, problem.metrics[0])
            continue
        for column, metric in enumerate(problem.metrics):
            cost, plan = minimum_cost(problem, metric)
            assert cost == pytest.approx(table.costs[:, column].min(), rel=1e-12) and plan in table.plans
        if len(problem.metrics) == 1 and fronts < 8 and problem.allows(problem.dense_plan):
            fronts += 1
            for point in pareto(problem, 12).points:
                best = table.best({0: point.costs[problem.metrics[0]]})
                assert point.objective == pytest.approx(table.values[best], rel=1e-9, abs=1e-12)
    assert fronts == 8


FREE = {"ms": np.zeros((2, 2))}


def two(allowed, **term):
    dimensions = (ProblemDimension("a", (1, 2)), ProblemDimension("b", (1, 2)))
    worth = ProblemTerm("worth", (0,), None, {"ms": np.array([1.0, 2.0])}, np.array([1.0, 2.0]))
    link = ProblemTerm(
        **{"name": "link", "dimensions": (0, 1), "block": None, "costs": FREE, "allowed": allowed, **term}
    )
    return PruningProblem("two", ("ms",), dimensions, (ProblemBlock("branch"),), (worth, link))


def test_a_mask_of_ones_is_none_and_nothing_is_read_where_nothing_is_allowed():
    plain, ones = two(None), two(np.ones((2, 2), dtype=bool))
    assert ones.terms[1].allowed is None and problem_digest(plain) == problem_digest(ones)
    bad = np.array([[np.nan, 1.0], [0.0, -np.inf]])
    problem = two(np.array([[False, True], [True, False]]), costs={"ms": bad})
    assert problem.terms[1].costs["ms"].tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert solve(problem, {"ms": 9.0}).plan == ProblemStructure((1, 0), (True,))


@pytest.mark.parametrize(
    "term,words",
    [
        ({"allowed": np.ones((2, 2))}, ["'link'", "boolean", "float64"]),
        ({"allowed": np.ones((2, 3), dtype=bool)}, ["'link'", "(2, 3)", "(2, 2)"]),
        ({"allowed": None, "when_removed": True}, ["'link'", "no block"]),
    ],
)
def test_bad_masks_are_refused_by_name(term, words):
    with pytest.raises(InvalidProblemError) as caught:
        two(**term)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_forbidden_plan_is_refused_with_its_counts():
    problem = two(np.array([[True, False], [True, True]]))
    with pytest.raises(InvalidProblemError, match=r"term 'link' does not allow a = 1, b = 2"):
        problem.evaluate(ProblemStructure((0, 1), (True,)))
    forbidden_dense = two(np.array([[True, True], [True, False]]))
    with pytest.raises(InvalidProblemError, match=r"does not allow a = 2, b = 2"):
        _ = forbidden_dense.dense
    assert solve(forbidden_dense, {"ms": 9.0}).plan == ProblemStructure((1, 0), (True,))


def test_what_replaces_a_removed_block_may_cost_and_forbid():
    """A removed branch leaves a copy of 0.7 ms and cannot go together with the wide input."""
    dimension = (ProblemDimension("width", (8, 16)),)
    terms = (
        ProblemTerm("width", (0,), None, {"ms": np.array([1.0, 2.0])}, np.array([1.0, 5.0])),
        ProblemTerm("branch", (0,), 0, {"ms": np.array([2.0, 4.0])}, np.array([0.5, 0.5])),
        ProblemTerm("copy", (0,), 0, {"ms": np.array([0.7, 0.0])}, None, np.array([True, False]), when_removed=True),
    )
    problem = PruningProblem("branch", ("ms",), dimension, (ProblemBlock("branch"),), terms)
    assert minimum_cost(problem, "ms") == (1.7, ProblemStructure((0,), (False,)))
    assert solve(problem, {"ms": 5.9}).plan == ProblemStructure((0,), (True,))
    assert solve(problem, {"ms": 2.9}).plan == ProblemStructure((0,), (False,))
    assert solve(problem, {"ms": 6.0}).plan == ProblemStructure((1,), (True,))


def test_files_of_version_1_are_read_and_masks_come_back(tmp_path, masked_problem, global_problem, random_problem):
    for make in (masked_problem, global_problem, random_problem):
        for seed in range(1500, 1515):
            problem = make(seed)
            problem.save(tmp_path / "p.npz")
            loaded = PruningProblem.load(tmp_path / "p.npz")
            assert (
                problem_digest(loaded) == problem_digest(problem)
                and loaded.global_dimensions == problem.global_dimensions
            )
            for one, other in zip(loaded.terms, problem.terms, strict=True):
                assert (one.allowed is None) == (other.allowed is None) and one.when_removed == other.when_removed
                assert one.allowed is None or (one.allowed == other.allowed).all()


def test_known_digests_stay():
    """Version 1 files, and what certificates of earlier releases say about them."""
    known = {
        "off_r50_step29": "1d4ca300a6f36c47dcc013e03faac01c68cd43243c51c552e8f6161c843e7e07",
        "spetr_r50_c32": "8a1f7f302b092c9a0e39552d225abb3a961ae8977b6af5bf874a9a97574387b1",
    }
    for name, sha in known.items():
        assert problem_digest(PruningProblem.load(data_path(f"solver_instances/{name}.npz"))) == sha
