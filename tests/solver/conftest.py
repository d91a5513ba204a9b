"""Random small problems and the exhaustive oracle."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest

from mdp_mmdet3d.errors import InfeasibleBudgetError
from mdp_mmdet3d.solver import (
    NoStructureError,
    ProblemBlock,
    ProblemDimension,
    ProblemStructure,
    ProblemTerm,
    PruningProblem,
    SolveOptions,
    SolveResult,
    SolveStatus,
    solve,
)

TOLERANCE = 1e-9


def make_problem(seed: int) -> PruningProblem:
    """Up to 5 dimensions of up to 4 options, 4 nested blocks, 9 terms over 0-3 dimensions, 1-3 metrics.

    The seed also decides the numbers: small integers (many ties), floats, value proportional to the first cost,
    a spread of 1e12, or values around 1e-15 with costs around 1e-9.
    """
    rng = np.random.default_rng(seed)
    style = seed % 5
    metrics = ("latency_ms", "params", "memory_mb")[: int(rng.choice([1, 1, 1, 2, 3]))]
    dimensions = tuple(
        ProblemDimension(f"d{i}", tuple(np.cumsum(rng.integers(1, 9, rng.integers(1, 5))) - int(rng.integers(2))))
        for i in range(rng.integers(1, 6))
    )
    blocks = tuple(
        ProblemBlock(f"b{i}", int(rng.integers(i)) if i and rng.random() < 0.5 else None)
        for i in range(rng.integers(0, 5))
    )

    def numbers(shape: tuple[int, ...]) -> np.ndarray:
        if style == 0:
            return rng.integers(0, 4, shape).astype(float)
        if style == 3:
            return 10.0 ** rng.uniform(-12, 0, shape)
        return rng.random(shape) * (1e-9 if style == 4 else 1.0)

    terms = []
    for i in range(rng.integers(1, 10)):
        axes = tuple(rng.permutation(len(dimensions))[: rng.integers(0, 4)].tolist())
        shape = tuple(len(dimensions[d].options) for d in axes)
        block = int(rng.integers(len(blocks))) if blocks and rng.random() < 0.7 else None
        costs = {metric: numbers(shape) for metric in metrics}
        if rng.random() < 0.2:
            costs = {metric: np.zeros(shape) for metric in metrics}
        value = numbers(shape) * (1e-6 if style == 4 else 1.0)
        if style == 2:
            value = costs[metrics[0]] * 3.0
        terms.append(ProblemTerm(f"t{i}", axes, block, costs, None if rng.random() < 0.2 else value))
    return PruningProblem(f"random {seed}", metrics, dimensions, blocks, tuple(terms))


@dataclass(frozen=True)
class Table:
    """Every structure of a problem: plans, values ``(P,)``, costs ``(P, M)``."""

    plans: list[ProblemStructure]
    values: np.ndarray
    costs: np.ndarray

    def best(self, limits: Mapping[int, float]) -> int | None:
        """Index of the optimum under limits per metric index, ties decided; None where nothing is within."""
        within = np.ones(len(self.plans), dtype=bool)
        for metric, limit in limits.items():
            within &= self.costs[:, metric] <= limit * (1.0 + TOLERANCE)
        if not within.any():
            return None
        chosen = np.flatnonzero(within)
        for column, sign in [(self.values, 1.0), *((self.costs[:, m], -1.0) for m in sorted(limits))]:
            top = (sign * column[chosen]).max()
            chosen = chosen[sign * column[chosen] >= top - 1e-11 * abs(top)]
        return max(chosen.tolist(), key=lambda i: (self.plans[i].options, self.plans[i].kept))


def enumerate_plans(problem: PruningProblem) -> Table:
    """All canonical plans and their evaluation, by brute force."""
    plans = []
    for kept in itertools.product((False, True), repeat=len(problem.blocks)):
        if any(k and b.parent is not None and not kept[b.parent] for k, b in zip(kept, problem.blocks)):
            continue
        used = {d for t in problem.terms if counts(problem, t, kept) for d in t.dimensions}
        choices = [
            range(len(d.options)) if i in used else [len(d.options) - 1] for i, d in enumerate(problem.dimensions)
        ]
        plans += [ProblemStructure(options, kept) for options in itertools.product(*choices)]
    options = np.array([plan.options for plan in plans]).reshape(len(plans), -1)
    values, costs = np.zeros(len(plans)), np.zeros((len(plans), len(problem.metrics)))
    allowed = np.ones(len(plans), dtype=bool)
    for term in problem.terms:
        share = np.array([float(counts(problem, term, plan.kept)) for plan in plans])
        index = tuple(options[:, d] for d in term.dimensions)
        if term.value is not None:
            values += share * term.value[index]
        if term.allowed is not None:
            allowed &= (share == 0.0) | term.allowed[index]
        for column, metric in enumerate(problem.metrics):
            costs[:, column] += share * term.costs[metric][index]
    return Table([plan for plan, fine in zip(plans, allowed) if fine], values[allowed], costs[allowed])


def counts(problem: PruningProblem, term: ProblemTerm, kept: tuple[bool, ...]) -> bool:
    """Whether a term counts under the given kept flags."""
    if term.block is None:
        return True
    parent = problem.blocks[term.block].parent
    return (not kept[term.block] and (parent is None or kept[parent])) if term.when_removed else kept[term.block]


def make_masked(seed: int) -> PruningProblem:
    """As `make_problem`, with masks in some terms, terms of masks alone, and terms that count for removed blocks.

    Now and then the masks exclude everything; in every third problem some values are below 0.
    """
    problem = make_problem(seed)
    rng = np.random.default_rng(seed + 3 * 10**6)
    strictness = rng.choice([0.15, 0.4, 0.7])

    def mask(shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(rng.random(shape) >= strictness)

    terms = []
    for term in problem.terms:
        shape = tuple(len(problem.dimensions[d].options) for d in term.dimensions)
        value = term.value
        if value is not None and seed % 3 == 0 and rng.random() < 0.3:
            value = value - value.max() * rng.choice([0.5, 1.0])
        removed = term.block is not None and rng.random() < 0.25
        allowed = mask(shape) if rng.random() < 0.5 else None
        terms.append(replace(term, value=value, when_removed=removed, allowed=allowed))
    for i in range(rng.integers(0, 3)):
        axes = tuple(rng.permutation(len(problem.dimensions))[: rng.integers(1, 4)].tolist())
        shape = tuple(len(problem.dimensions[d].options) for d in axes)
        block = int(rng.integers(len(problem.blocks))) if problem.blocks and rng.random() < 0.5 else None
        free = {metric: np.zeros(shape) for metric in problem.metrics}
        removed = block is not None and rng.random() < 0.4
        terms.append(ProblemTerm(f"link {i}", axes, block, free, None, mask(shape), removed))
    return replace(problem, name=f"masked {seed}", terms=tuple(terms))


def make_global(seed: int) -> PruningProblem:
    """A masked problem in which one or two dimensions are global and some terms depend on them as well."""
    problem = make_masked(seed) if seed % 2 else make_problem(seed)
    rng = np.random.default_rng(seed + 5 * 10**6)
    chosen = tuple(rng.permutation(len(problem.dimensions))[: rng.integers(1, 3)].tolist())
    terms = []
    for term in problem.terms:
        more = tuple(d for d in chosen if d not in term.dimensions and rng.random() < 0.6)
        shape = tuple(len(problem.dimensions[d].options) for d in (*term.dimensions, *more))
        stretch = rng.choice([0.5, 1.0, 2.0], size=shape)

        def wider(array: np.ndarray | None, shape=shape, stretch=stretch) -> np.ndarray | None:
            if array is None:
                return None
            array = np.broadcast_to(array.reshape(array.shape + (1,) * (len(shape) - array.ndim)), shape)
            return array.copy() if array.dtype == bool else array * stretch

        terms.append(
            replace(
                term,
                dimensions=(*term.dimensions, *more),
                costs={metric: wider(cost) for metric, cost in term.costs.items()},
                value=wider(term.value),
                allowed=wider(term.allowed),
            )
        )
    return replace(problem, name=f"global {seed}", terms=tuple(terms), global_dimensions=chosen)


def random_budgets(problem: PruningProblem, table: Table, seed: int) -> dict[str, float]:
    """Limits between the smallest and the largest cost, now and then below it."""
    rng = np.random.default_rng(seed + 10**6)
    budgets = {}
    for column, metric in enumerate(problem.metrics):
        low, high = table.costs[:, column].min(), table.costs[:, column].max()
        choices = [low, low + rng.choice([0.15, 0.4, 0.7]) * (high - low), high, rng.choice(table.costs[:, column])]
        budgets[metric] = float(rng.choice(choices) * (0.9 if rng.random() < 0.05 else 1.0))
    return budgets


def check(
    problem: PruningProblem, table: Table, seed: int, options: SolveOptions, exact_plan: bool
) -> SolveResult | None:
    """Compare a solve with the exhaustive search; its result, None where there is no plan."""
    if not table.plans:
        with pytest.raises(NoStructureError, match=r"exclude every structure: with that of term '(t|link) ?\d"):
            solve(problem, dict.fromkeys(problem.metrics, 1.0), options)
        return None
    budgets = random_budgets(problem, table, seed)
    expected = table.best({column: budgets[metric] for column, metric in enumerate(problem.metrics)})
    if expected is None:
        with pytest.raises(InfeasibleBudgetError):
            solve(problem, budgets, options)
        return None
    result = solve(problem, budgets, options)
    span = table.values[expected] - problem.least_value
    assert result.status is SolveStatus.OPTIMAL
    assert result.objective == pytest.approx(table.values[expected], rel=1e-12, abs=2e-6 * span)
    assert result.bound >= table.values[expected] - 1e-9 * span
    for column, metric in enumerate(problem.metrics):
        assert result.costs[metric] <= budgets[metric] * (1 + 1e-9)
        assert result.minimum[metric] == pytest.approx(table.costs[:, column].min(), rel=1e-9)
        complete = [cost for cost, plan in zip(table.costs[:, column], table.plans) if all(plan.kept)]
        assert result.minimum_all_blocks[metric] == (pytest.approx(min(complete), rel=1e-9) if complete else None)
    if exact_plan:
        assert result.plan == table.plans[expected]
    assert result.plan in table.plans
    return result


@pytest.fixture(scope="session")
def random_problem() -> Callable[[int], PruningProblem]:
    """Problem of a seed."""
    return make_problem


@pytest.fixture(scope="session")
def masked_problem() -> Callable[[int], PruningProblem]:
    """Problem of a seed, with masks."""
    return make_masked


@pytest.fixture(scope="session")
def global_problem() -> Callable[[int], PruningProblem]:
    """Problem of a seed, with global dimensions."""
    return make_global


@pytest.fixture(scope="session")
def brute_force() -> Callable[[PruningProblem], Table]:
    """Table of all plans of a problem."""
    return enumerate_plans


@pytest.fixture(scope="session")
def budgets_of() -> Callable[..., dict[str, float]]:
    """Random budgets of a problem."""
    return random_budgets


@pytest.fixture(scope="session")
def against_oracle() -> Callable[..., SolveResult | None]:
    """Comparison of a solve with the table of all plans."""
    return check
