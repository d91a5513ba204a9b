"""Sum dimensions against an oracle that adds up counts by itself; concatenations as detectors have them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from mdp_mmdet3d.errors import InfeasibleBudgetError, MdpError
from mdp_mmdet3d.solver import (
    InvalidProblemError,
    ProblemBlock,
    ProblemDimension,
    ProblemStructure,
    ProblemTerm,
    PruningProblem,
    SolveStatus,
    solve,
)
from mdp_mmdet3d.solver.baselines import greedy, halp, uniform
from mdp_mmdet3d.solver.links import SumPart, add_sum
from mdp_mmdet3d.sums import attainable_sums, sum_allowed, sum_options

from .routes import ROUTES as ALL_ROUTES

ROUTES = {name: every for name, every in ALL_ROUTES.items() if not name.startswith("labels")}


class Concatenation:
    """A random problem with a sum over some of its dimensions and a term that depends on the sum."""

    def __init__(self, seed, make):
        rng = np.random.default_rng(seed + 9 * 10**6)
        self.base = base = make(seed)
        while len(base.dimensions) < 2:
            seed += 1000
            self.base = base = make(seed)
        inner = [b for b, chain in enumerate(base.chains) if len(chain) > 1]
        home = base.blocks[int(rng.choice(inner))].parent if inner and rng.random() < 0.5 else None
        within = [b for b, chain in enumerate(base.chains) if home is None or home in chain[1:]]
        count = int(rng.integers(1, min(4, len(base.dimensions)) + 1))
        self.home, self.fixed = home, int(rng.choice([0, 3]))
        self.parts = [
            SumPart(int(d), int(rng.choice(within)) if within and rng.random() < 0.5 else None)
            for d in rng.permutation(len(base.dimensions))[:count]
        ]
        self.limit, self.multiple = int(rng.choice([2, 4, 16])), int(rng.choice([1, 4]))
        problem, self.total = add_sum(
            base, "sum", self.parts, fixed=self.fixed, block=home, limit=self.limit, multiple=self.multiple
        )
        size = len(problem.dimensions[self.total].options)
        unit = max((float(t.costs[m].max()) for t in base.terms for m in base.metrics), default=0.0) or 1.0
        worth = max((float(np.abs(t.value).max()) for t in base.terms if t.value is not None), default=0.0) or 1.0
        costs = {metric: unit * rng.random(size) for metric in problem.metrics}
        self.reader = ProblemTerm("reader", (self.total,), home, costs, worth * rng.random(size))
        self.problem = replace(problem, terms=(*problem.terms, self.reader))

    def index_of_sum(self, options, kept):
        """The sum's option by plain arithmetic, rounded up after every part as the chain does."""
        names = [d.name for d in self.problem.dimensions]
        parts = sorted(self.parts, key=lambda part: part.block is not None)
        counts = [
            self.base.dimensions[p.dimension].options[options[p.dimension]] if p.block is None or kept[p.block] else 0
            for p in parts
        ]
        if len(parts) == 1 and parts[0].block is None and not self.fixed:
            return options[parts[0].dimension]
        running, start = (self.fixed, 0) if self.fixed or parts[0].block is not None else (counts[0], 1)
        for number in range(start, len(parts)):
            label = "sum" if number == len(parts) - 1 else f"sum[{number + 1}]"
            choices = self.problem.dimensions[names.index(label)].options
            index = next(i for i, choice in enumerate(choices) if choice >= running + counts[number])
            running = choices[index]
        return index

    def table(self):
        """Value and costs of every structure of the base problem, the reader included."""
        base, rows = self.base, []
        for kept in itertools.product((False, True), repeat=len(base.blocks)):
            if any(k and b.parent is not None and not kept[b.parent] for k, b in zip(kept, base.blocks)):
                continue
            for options in itertools.product(*(range(len(d.options)) for d in base.dimensions)):
                found = base.evaluate(ProblemStructure(options, kept))
                value, costs = found.value, [found.costs[m] for m in base.metrics]
                if self.home is None or kept[self.home]:
                    index = self.index_of_sum(options, kept)
                    value += self.reader.value[index]
                    costs = [c + self.reader.costs[m][index] for c, m in zip(costs, base.metrics)]
                rows.append((value, *costs))
        return np.array(rows)


def compare(case, seed, options):
    rows = case.table()
    rng = np.random.default_rng(seed)
    columns = {metric: rows[:, 1 + i] for i, metric in enumerate(case.base.metrics)}
    share = rng.choice([0.0, 0.2, 0.5, 1.0], size=len(columns))
    budgets = {m: float(c.min() + s * (c.max() - c.min())) for (m, c), s in zip(columns.items(), share)}
    within = np.all([columns[m] <= b * (1 + 1e-9) for m, b in budgets.items()], axis=0)
    if not within.any():
        with pytest.raises(InfeasibleBudgetError):
            solve(case.problem, budgets, options)
        return False
    result = solve(case.problem, budgets, options)
    assert result.status is SolveStatus.OPTIMAL
    assert result.objective == pytest.approx(rows[within, 0].max(), rel=2e-6)
    for metric, column in columns.items():
        assert result.minimum[metric] == pytest.approx(column.min(), rel=1e-9)
    if case.home is None or result.plan.kept[case.home]:
        plain = result.plan.options[: len(case.base.dimensions)]
        assert result.plan.options[case.total] == case.index_of_sum(plain, result.plan.kept)
    return True


@pytest.mark.parametrize("batch", range(6))
def test_sums_agree_with_plain_arithmetic(batch, random_problem):
    solved = sum(
        compare(Concatenation(seed, random_problem), seed, ROUTES["all"]) for seed in range(batch * 30, batch * 30 + 30)
    )
    assert solved > 15


@pytest.mark.parametrize("route", list(ROUTES)[1:])
def test_every_route_by_itself(route, random_problem):
    for seed in range(2000, 2020):
        compare(Concatenation(seed, random_problem), seed, ROUTES[route])


def test_a_sum_may_be_conditioned(random_problem):
    """A global dimension may be a part, and so may the sum itself be global."""
    for seed in range(2100, 2130):
        case = Concatenation(seed, random_problem)
        for chosen in ((case.parts[0].dimension,), (case.total,)):
            compare_with = Concatenation(seed, random_problem)
            compare_with.problem = replace(case.problem, global_dimensions=chosen)
            compare(compare_with, seed, ROUTES["all"])


def test_options_are_attainable_rounded_up_and_few():
    rng = np.random.default_rng(0)
    for _ in range(200):
        parts = [np.unique(rng.integers(0, 300, rng.integers(1, 12))).tolist() for _ in range(rng.integers(1, 4))]
        fixed, multiple, limit = int(rng.integers(0, 20)), int(rng.choice([1, 8, 32])), int(rng.integers(2, 17))
        sums = attainable_sums(*parts, fixed=fixed)
        assert sums == sorted({fixed + sum(choice) for choice in itertools.product(*parts)})
        options = sum_options(sums, multiple=multiple, limit=limit)
        assert len(options) <= limit and options[-1] == sums[-1] and list(options) == sorted(set(options))
        assert all(option % multiple == 0 for option in options[:-1])
        assert sums[0] <= options[0] < sums[0] + multiple or len(options) == 1
        if multiple == 1 and len(sums) <= limit:
            assert list(options) == sums
        allowed = sum_allowed(*parts, options=options, fixed=fixed)
        assert (allowed.sum(axis=-1) == 1).all()
        for index in map(tuple, np.argwhere(allowed)[::7]):
            total = fixed + sum(part[i] for part, i in zip(parts, index))
            assert options[index[-1]] >= total and (index[-1] == 0 or options[index[-1] - 1] < total)


@pytest.mark.parametrize("limit,multiple,sums", [(1, 1, [1]), (4, 0, [1]), (4, 1, []), (4, 1, [-1, 2])])
def test_nonsense_is_refused(limit, multiple, sums):
    with pytest.raises(ValueError, match=r"at least|sums must"):
        sum_options(sums, multiple=multiple, limit=limit)


def test_an_option_below_a_sum_is_refused():
    with pytest.raises(ValueError, match="16"):
        sum_allowed((4, 8), (8,), options=(8, 12))


def concatenated():
    """Two branches are concatenated; the second may go. The reader pays for what it reads."""
    dimensions = (ProblemDimension("left", (8, 16)), ProblemDimension("right", (8, 16)))
    blocks = (ProblemBlock("right"),)
    terms = (
        ProblemTerm("left", (0,), None, {"ms": np.array([1.0, 2.0])}, np.array([2.0, 3.0])),
        ProblemTerm("right", (1,), 0, {"ms": np.array([1.0, 2.0])}, np.array([1.0, 1.5])),
    )
    problem, total = add_sum(PruningProblem("concat", ("ms",), dimensions, blocks, terms), "both",
                             [SumPart(1, 0), SumPart(0)])  # fmt: skip
    assert problem.dimensions[total] == ProblemDimension("both", (8, 16, 24, 32))
    reader = ProblemTerm("reader", (total,), None, {"ms": np.array([1.0, 2.0, 3.0, 4.0])})
    return replace(problem, terms=(*problem.terms, reader))


def test_a_removed_part_counts_nothing():
    problem = concatenated()
    for budget, left, right, both, kept in (
        (8.0, 16, 16, 32, True),
        (7.0, 16, 8, 24, True),  # the reader reads 24
        (4.9, 16, 16, 16, False),
        (2.0, 8, 16, 8, False),
    ):
        plan = solve(problem, {"ms": budget}).plan
        assert problem.counts(plan) == {"left": left, "right": right, "both": both} and plan.kept == (kept,)
    with pytest.raises(InvalidProblemError, match=r"'both' does not allow left = 16, right = 8, both = 32"):
        problem.evaluate(ProblemStructure((1, 0, 3), (True,)))
    with pytest.raises(InvalidProblemError, match=r"'both without right' does not allow left = 16, both = 24"):
        problem.evaluate(ProblemStructure((1, 1, 2), (False,)))


def test_baselines_keep_the_sums_or_say_that_they_cannot():
    problem = concatenated()
    found = halp(problem, "ms", 7.0)
    assert found.feasible and problem.allows(found.plan) and found.value <= solve(problem, {"ms": 7.0}).objective
    for method in (uniform, greedy):
        with pytest.raises(MdpError, match="ties counts together"):
            method(problem, "ms", 7.0)


def test_bad_sums_are_refused():
    problem = replace(concatenated(), blocks=(ProblemBlock("right"), ProblemBlock("other")))
    for parts, block, words in (
        ([], None, "no parts"),
        ([SumPart(9)], None, "dimension 9"),
        ([SumPart(0), SumPart(1, 0)], 1, "'right' does not lie within 'other'"),
    ):
        with pytest.raises(InvalidProblemError, match=words):
            add_sum(problem, "more", parts, block=block)
