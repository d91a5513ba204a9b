"""SCIP models of a pruning problem: exact, with block removal folded in (docs/method.md, section 5.2).

The options of a dimension that only block b uses sum to z_b instead of 1, so its terms need no further
factor and a removed block has one representation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mdp_mmdet3d.solver.model import MixedBinaryModel, ModelBuilder
from mdp_mmdet3d.solver.problem import ProblemStructure, ProblemTerm, PruningProblem

SCALE = 1000.0
"""Budgets and the largest value are mapped to this number, far above SCIP's tolerances."""


@dataclass(frozen=True)
class ScipFormulation:
    """A SCIP model and how to read its solutions.

    Attributes:
        model: Its objective times ``value_unit`` plus ``value_offset`` is the problem's value.
        value_unit: Value of one unit of the objective.
        value_offset: Value that every plan has.
        choices: Per dimension, the indices of its option binaries.
        blocks: Per block, the index of its binary.
    """

    model: MixedBinaryModel
    value_unit: float
    value_offset: float
    choices: tuple[np.ndarray, ...]
    blocks: np.ndarray

    def decode(self, binaries: list[int]) -> ProblemStructure:
        """The plan of a solution; options that a removed block leaves open come out as the last one."""
        flat = np.asarray(binaries)
        options = tuple(int(np.argmax(flat[c])) if flat[c].any() else len(c) - 1 for c in self.choices)
        return ProblemStructure(options, tuple(bool(flat[b]) for b in self.blocks))


def linearised(
    problem: PruningProblem, budgets: Mapping[str, float], value_unit: float, start: ProblemStructure | None = None
) -> ScipFormulation:
    """Mixed-integer linear model: each product of one-hots is a table of local marginals.

    Args:
        problem: What to solve.
        budgets: Upper limit per metric, in the metric's unit.
        value_unit: Value that becomes one unit of the objective.
        start: Feasible plan to start from.
    """
    draft = _Draft(problem, budgets, value_unit)
    for term in problem.terms:
        draft.book_marginals(term)
    return draft.finish(start)


def folded(
    problem: PruningProblem, budgets: Mapping[str, float], value_unit: float, start: ProblemStructure | None = None
) -> ScipFormulation:
    """Mixed-integer bilinear model: products of two one-hots stay products, further factors are linearised.

    So are terms that do not allow everything. Arguments as for `linearised`.
    """
    draft = _Draft(problem, budgets, value_unit, quadratic=True)
    for term in problem.terms:
        if len(term.dimensions) < 2 or term.allowed is not None or term.when_removed:
            draft.book_marginals(term)
        else:
            draft.book_products(term)
    return draft.finish(start)


def cheapest(problem: PruningProblem, metric: str, unit: float) -> ScipFormulation:
    """Linearised model whose objective is minus the metric's cost, in units of ``unit``, less what every plan costs."""
    draft = _Draft(problem, {metric: unit * SCALE}, 1.0)
    for term in problem.terms:
        draft.book_marginals(term)
    return draft.finish_cheapest(metric, unit)


def homes(problem: PruningProblem) -> list[int | None]:
    """Per dimension, the innermost block that holds all of its terms; None without one or without terms."""
    chains: list[tuple[int, ...] | None] = [None] * len(problem.dimensions)
    for term in problem.terms:
        chain = problem.home_chain(term)
        for d in term.dimensions:
            known = chains[d]
            chains[d] = chain if known is None else tuple(b for b in known if b in chain)
    return [chain[0] if chain else None for chain in chains]


class _Draft:
    """What the formulations share: one-hots, nesting, rows of value and budgets."""

    def __init__(
        self, problem: PruningProblem, budgets: Mapping[str, float], value_unit: float, quadratic: bool = False
    ) -> None:
        self.problem = problem
        self.budgets = budgets
        self.value_unit = value_unit
        self.value_offset = 0.0
        self.homes = homes(problem)
        self.used = dict.fromkeys(budgets, 0.0)
        keys = ("value", *budgets)
        self.linear: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {key: [] for key in keys}
        self.products: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {key: [] for key in keys}
        self.builder = builder = ModelBuilder()
        self.choices = tuple(builder.add_binaries(len(d.options)) for d in problem.dimensions)
        self.blocks = builder.add_binaries(len(problem.blocks))
        # A quadratic value cannot be SCIP's objective; this variable stands for it.
        self.epigraph = int(builder.add_continuous(1)[0]) if quadratic else None
        for columns, home in zip(self.choices, self.homes):
            self._sums_to(columns, home)
        for child, block in zip(self.blocks, problem.blocks):
            if block.parent is not None:
                nested = np.array([child, self.blocks[block.parent]])
                builder.add_row(nested, np.array([1.0, -1.0]), -np.inf, 0.0)

    def _sums_to(self, columns: np.ndarray, block: int | None) -> None:
        if block is None:
            self.builder.add_row(columns, 1.0, 1.0, 1.0)
        else:
            ones = np.ones(columns.size)
            self.builder.add_row(np.append(columns, self.blocks[block]), np.append(ones, -1.0), 0.0, 0.0)

    def book_marginals(self, term: ProblemTerm) -> None:
        """Let a term count with local marginals; those that it does not allow are 0."""
        if term.when_removed:
            columns = self._marginals_when_removed(term)
        elif term.dimensions:
            columns = self.marginals(term.dimensions, term.block)
        elif term.block is not None:
            columns = self.blocks[term.block : term.block + 1].reshape(())
        elif term.allowed is None:
            self.value_offset += 0.0 if term.value is None else float(term.value)
            for metric in self.budgets:
                self.used[metric] += float(term.costs[metric])
            return
        else:
            self.builder.add_row(self.builder.add_continuous(1), 1.0, -np.inf, -1.0)  # nothing is allowed
            return
        if term.allowed is not None:
            self.builder.add_row(columns[~term.allowed], 1.0, -np.inf, 0.0)
        for key, array in self._arrays(term):
            self.linear[key].append((columns.ravel(), array.ravel()))

    def _marginals_when_removed(self, term: ProblemTerm) -> np.ndarray:
        """As `marginals`, while the term's block is removed and its parent is kept."""
        block = term.block
        assert block is not None  # checked by the problem
        shape = tuple(self.choices[d].size for d in term.dimensions)
        table = self.builder.add_continuous(int(np.prod(shape))).reshape(shape)
        for axis, d in enumerate(term.dimensions):
            for column, part in zip(self.choices[d], np.moveaxis(table, axis, 0)):
                self.builder.add_row(np.append(part, column), np.append(np.ones(part.size), -1.0), -np.inf, 0.0)
        columns, coefficients, total = np.append(table, self.blocks[block]), np.ones(table.size + 1), 1.0
        parent = self.problem.blocks[block].parent
        if parent is not None:
            columns, coefficients, total = np.append(columns, self.blocks[parent]), np.append(coefficients, -1.0), 0.0
        self.builder.add_row(columns, coefficients, total, total)
        return table

    def marginals(self, dimensions: tuple[int, ...], block: int | None) -> np.ndarray:
        """Variables, one per joint option, that are 1 for the chosen one while ``block`` is kept, else 0."""
        if len(dimensions) == 1 and self.homes[dimensions[0]] == block:
            return self.choices[dimensions[0]]
        shape = tuple(self.choices[d].size for d in dimensions)
        table = self.builder.add_continuous(int(np.prod(shape))).reshape(shape)
        tied = False
        for axis, d in enumerate(dimensions):
            private = self.homes[d] == block
            tied |= private
            for column, part in zip(self.choices[d], np.moveaxis(table, axis, 0)):
                coefficients = np.append(np.ones(part.size), -1.0)
                self.builder.add_row(np.append(part, column), coefficients, 0.0 if private else -np.inf, 0.0)
        if not tied:
            self._sums_to(table.ravel(), block)
        return table

    def book_products(self, term: ProblemTerm) -> None:
        """Let a term over two or three dimensions count with products of two variables."""
        first, *rest = term.dimensions
        left = self.choices[first]
        if len(rest) > 1:
            right = self.marginals(tuple(rest), term.block)
        else:
            right = self.choices[rest[0]]
            if term.block not in (self.homes[first], self.homes[rest[0]]):
                left = self.marginals((first,), term.block)
        pairs = np.broadcast_arrays(left.reshape(-1, *(1,) * right.ndim), right[None])
        for key, array in self._arrays(term):
            self.products[key].append((pairs[0].ravel(), pairs[1].ravel(), array.ravel()))

    def finish(self, start: ProblemStructure | None) -> ScipFormulation:
        """Add the budget rows and the objective."""
        for metric, budget in self.budgets.items():
            unit = (budget or 1.0) / SCALE  # under a budget of 0 only costs of 0 count, in whatever unit
            columns, coefficients = self._summed(metric)
            rest = (budget - self.used[metric]) / unit
            row = self.builder.add_row(columns, coefficients / unit, -np.inf, rest)
            self._add_products(row, metric, 1.0 / unit)
        columns, coefficients = self._summed("value")
        if self.epigraph is None:
            self.builder.set_objective(columns, coefficients / self.value_unit)
        else:
            self.builder.set_objective(np.array([self.epigraph]), np.ones(1))
            columns = np.append(columns, self.epigraph)
            coefficients = np.append(coefficients / self.value_unit, -1.0)
            row = self.builder.add_row(columns, coefficients, 0.0, np.inf)
            self._add_products(row, "value", 1.0 / self.value_unit)
        model = self.builder.build(None if start is None else self._encode(start))
        return ScipFormulation(model, self.value_unit, self.value_offset, self.choices, self.blocks)

    def finish_cheapest(self, metric: str, unit: float) -> ScipFormulation:
        """Minimise a metric instead; no budget rows."""
        columns, coefficients = self._summed(metric)
        self.builder.set_objective(columns, -coefficients / unit)
        return ScipFormulation(self.builder.build(None), 1.0, 0.0, self.choices, self.blocks)

    def _summed(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        total = np.zeros(self.builder.size)
        for columns, array in self.linear[key]:
            np.add.at(total, columns, array)
        nonzero = np.flatnonzero(total)
        return nonzero, total[nonzero]

    def _add_products(self, row: int, key: str, factor: float) -> None:
        for left, right, array in self.products[key]:
            nonzero = np.flatnonzero(array)
            self.builder.add_products(row, left[nonzero], right[nonzero], array[nonzero] * factor)

    def _encode(self, plan: ProblemStructure) -> np.ndarray:
        flat = np.zeros(self.builder.binaries)
        flat[self.blocks] = plan.kept
        for columns, home, option in zip(self.choices, self.homes, plan.options):
            if home is None or plan.kept[home]:
                flat[columns[option]] = 1.0
        return flat

    def _arrays(self, term: ProblemTerm) -> list[tuple[str, np.ndarray]]:
        arrays = [(metric, term.costs[metric]) for metric in self.budgets]
        return arrays if term.value is None else [("value", term.value), *arrays]
