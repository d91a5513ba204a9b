"""The group graph: dimensions and blocks as variables, terms as tables over few of them.

A dimension that only one block uses gets one more state, "off", which means that the block is removed. So a
block with such a dimension needs no variable of its own; any other is a variable with two states.

A table with negative values is raised by its lowest one, also where its block is removed, and the offset falls by it:
all tables hold numbers >= 0, which bounds, dominance and labels rely on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mdp_mmdet3d.solver.formulations import homes
from mdp_mmdet3d.solver.problem import ProblemStructure, ProblemTerm, PruningProblem

FORBIDDEN = -1e30
"""Value of combinations that are no structure: finite, so that sums and differences never give NaN."""


@dataclass(frozen=True)
class Factor:
    """A table over some variables.

    Attributes:
        scope: Increasing variable indices, the axes of the arrays.
        value: What a combination is worth; `FORBIDDEN` where it is no structure.
        costs: ``(M, ...)``, what it costs per metric.
    """

    scope: tuple[int, ...]
    value: np.ndarray
    costs: np.ndarray

    def weighted(self, weight: float, multipliers: np.ndarray) -> np.ndarray:
        """``weight * value - multipliers @ costs``, hardly anything where it is no structure."""
        table = weight * self.value if weight else np.where(self.value > FORBIDDEN / 2, 0.0, FORBIDDEN)
        for multiplier, cost in zip(multipliers, self.costs):
            if multiplier:
                table = table - multiplier * cost
        return table


@dataclass(frozen=True)
class FactorGraph:
    """Maximise the sum of all tables' values under limits on the sums of their costs.

    Attributes:
        problem: Where it comes from.
        metrics: Metrics in the order of the costs' first axis.
        states: Per variable, which of its original states are left. For a dimension with K options, state
            k < K is option k and state K is "off"; a block variable has the states 0 removed, 1 kept.
        factors: Tables with distinct scopes.
        homes: Per dimension, the innermost block that holds all of its terms.
        witness: Per block, the variable that tells whether it is kept.
        offset_value: Value that every plan has; the tables of a plan add the rest, which is >= 0.
        offset_costs: ``(M,)``, costs that every plan has.
    """

    problem: PruningProblem
    metrics: tuple[str, ...]
    states: tuple[np.ndarray, ...]
    factors: tuple[Factor, ...]
    homes: tuple[int | None, ...]
    witness: tuple[int, ...]
    offset_value: float
    offset_costs: np.ndarray

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of states left per variable."""
        return tuple(len(states) for states in self.states)

    def restrict(self, keep: Sequence[np.ndarray]) -> FactorGraph:
        """The graph with only the states where ``keep`` (one boolean array per variable) is true.

        Tables lose the axes of variables with one state left, so that these connect nothing any more.
        """
        index = [np.flatnonzero(mask) for mask in keep]
        content: dict[tuple[int, ...], Factor] = {}
        for factor in self.factors:
            scope = tuple(v for v in factor.scope if len(index[v]) > 1) or factor.scope[:1]
            rows = np.ix_(*(index[v] for v in factor.scope))
            dropped = tuple(axis for axis, v in enumerate(factor.scope) if v not in scope)
            value = factor.value[rows].squeeze(axis=dropped)
            costs = np.stack([cost[rows].squeeze(axis=dropped) for cost in factor.costs])
            if scope in content:
                value = np.maximum(value + content[scope].value, FORBIDDEN)
                costs = costs + content[scope].costs
            content[scope] = Factor(scope, value, costs)
        states = tuple(states[mask] for states, mask in zip(self.states, keep))
        return replace(self, states=states, factors=tuple(content.values()))

    def with_all_blocks(self) -> FactorGraph:
        """The graph of the plans that remove no block."""
        keep = [np.ones(len(states), dtype=bool) for states in self.states]
        for block in range(len(self.witness)):
            keep[self.witness[block]] = self.kept_states(block)
        return self.restrict(keep)

    def locate(self, plan: ProblemStructure) -> list[int] | None:
        """The assignment of a plan, None where it uses a state that is not left or a forbidden combination."""
        count = len(self.problem.dimensions)
        wanted = [
            option if home is None or plan.kept[home] else len(dimension.options)
            for option, home, dimension in zip(plan.options, self.homes, self.problem.dimensions)
        ]
        wanted += [0] * (len(self.states) - count)
        for block, variable in enumerate(self.witness):
            if variable >= count:
                wanted[variable] = int(plan.kept[block])
        positions = [np.flatnonzero(states == state) for states, state in zip(self.states, wanted)]
        if not all(len(p) for p in positions):
            return None
        assignment = [int(p[0]) for p in positions]
        return assignment if self.allows(assignment) else None

    def possible(self, total: float) -> bool:
        """Whether a maximum over all assignments is that of a structure."""
        return self.offset_value + total > FORBIDDEN / 2

    def allows(self, assignment: Sequence[int]) -> bool:
        """Whether an assignment is a structure."""
        return all(f.value[tuple(assignment[v] for v in f.scope)] > FORBIDDEN / 2 for f in self.factors)

    def rescaled(self, value_unit: float) -> FactorGraph:
        """The graph with values in units of ``value_unit`` of its present unit."""
        factors = tuple(
            replace(factor, value=np.where(factor.value > FORBIDDEN / 2, factor.value / value_unit, FORBIDDEN))
            for factor in self.factors
        )
        return replace(self, factors=factors, offset_value=self.offset_value / value_unit)

    def without_entries_beyond(self, limits: np.ndarray, largest_value: float) -> FactorGraph:
        """Forbid table entries that alone exceed a limit or are worth more than any plan within the limits."""
        factors = []
        for factor in self.factors:
            beyond = factor.value > largest_value
            for cost, limit in zip(factor.costs, limits):
                beyond |= cost > limit
            # Their numbers may be so large that sums with them would lose the others' digits.
            factors.append(
                Factor(factor.scope, np.where(beyond, FORBIDDEN, factor.value), np.where(beyond, 0.0, factor.costs))
            )
        return replace(self, factors=tuple(factors))

    def measure(self, assignment: Sequence[int]) -> tuple[float, np.ndarray]:
        """Value and ``(M,)`` costs of an assignment, without the offsets."""
        value, costs = 0.0, np.zeros(len(self.metrics))
        for factor in self.factors:
            index = tuple(assignment[v] for v in factor.scope)
            value += float(factor.value[index])
            costs += np.array([cost[index] for cost in factor.costs])
        return value, costs

    def kept_states(self, block: int) -> np.ndarray:
        """Which states of a block's witness mean that the block is kept."""
        witness = self.witness[block]
        if witness < len(self.problem.dimensions):
            return self.states[witness] < len(self.problem.dimensions[witness].options)
        return self.states[witness] == 1

    def decode(self, assignment: Sequence[int]) -> ProblemStructure:
        """The canonical plan of an assignment (position among the states left, per variable)."""
        chosen = [int(states[position]) for states, position in zip(self.states, assignment)]
        count = len(self.problem.dimensions)
        last = [len(d.options) - 1 for d in self.problem.dimensions]
        kept = tuple(bool(chosen[v] <= last[v]) if v < count else chosen[v] == 1 for v in self.witness)
        options = tuple(min(chosen[d], last[d]) for d in range(count))
        return self.problem.canonical(ProblemStructure(options, kept))


def build_graph(
    problem: PruningProblem, metrics: Sequence[str], value_unit: float, cost_units: Sequence[float]
) -> FactorGraph:
    """The group graph of a problem.

    Args:
        problem: What to solve.
        metrics: Metrics that are limited.
        value_unit: Value that becomes 1.
        cost_units: Per metric, the cost that becomes 1.
    """
    home = homes(problem)
    members: dict[int, list[int]] = {}
    for dimension, block in enumerate(home):
        if block is not None:
            members.setdefault(block, []).append(dimension)
    on = [np.arange(len(d.options) + (home[i] is not None)) < len(d.options) for i, d in enumerate(problem.dimensions)]
    witness = []
    for block in range(len(problem.blocks)):
        if block in members:
            witness.append(members[block][0])
        else:
            witness.append(len(on))
            on.append(np.array([False, True]))
    if not on:
        on.append(np.array([True]))  # every sum runs over at least one variable
    tables, offset = _Tables(on, len(metrics)), 0.0
    for term in problem.terms:
        if term.when_removed:
            continue
        value = np.zeros(_shape(problem, term)) if term.value is None else term.value / value_unit
        least = min(0.0, float(value.min()))
        costs = [term.costs[metric] / unit for metric, unit in zip(metrics, cost_units)]
        scope, deciding = term.dimensions, {d for d in term.dimensions if home[d] == term.block}
        if term.block is not None and not deciding:
            scope, deciding = (*scope, witness[term.block]), {witness[term.block]}
            value, costs = value[..., None], [cost[..., None] for cost in costs]
        tables.add(scope, value - least, costs, deciding if term.block is not None else set(), -least)
        offset += least
        if term.allowed is not None:
            tables.forbid(scope, tables.where(scope, [True] * len(scope), ~term.allowed))
    for term in problem.terms:
        if term.when_removed:
            offset += _add_when_removed(tables, problem, term, witness, value_unit, metrics, cost_units)
    for variables in members.values():
        for left, right in _spanning_tree(variables, problem.terms):
            tables.forbid((left, right), on[left][:, None] != on[right])
    for block, data in enumerate(problem.blocks):
        if data.parent is not None:
            child, parent = witness[block], witness[data.parent]
            tables.forbid((child, parent), on[child][:, None] & ~on[parent])
    constant = tables.content.pop((), [np.zeros(()), np.zeros(len(metrics))])
    return FactorGraph(
        problem=problem,
        metrics=tuple(metrics),
        states=tuple(np.arange(len(mask)) for mask in on),
        factors=tuple(Factor(scope, value, cost) for scope, (value, cost) in sorted(tables.content.items())),
        homes=tuple(home),
        witness=tuple(witness),
        offset_value=float(constant[0]) + offset,
        offset_costs=constant[1],
    )


class _Tables:
    """Sums tables of equal scope; ``on`` tells per variable which states mean "kept"."""

    def __init__(self, on: list[np.ndarray], metrics: int) -> None:
        self.on = on
        self.metrics = metrics
        self.content: dict[tuple[int, ...], list[np.ndarray]] = {}

    def add(
        self, scope: tuple[int, ...], value: np.ndarray, costs: list[np.ndarray], deciding: set[int], without: float
    ) -> None:
        """Add a term that counts while its variables are on; worth ``without`` where all ``deciding`` ones are off."""
        shape = tuple(len(self.on[v]) for v in scope)
        full_value, full_costs = np.full(shape, FORBIDDEN), np.zeros((self.metrics, *shape))
        if deciding:
            removed = np.ix_(*(np.flatnonzero(~self.on[v] | (v not in deciding)) for v in scope))
            full_value[removed] = without
        kept = np.ix_(*(np.flatnonzero(self.on[v]) for v in scope))
        full_value[kept] = value
        for metric, cost in enumerate(costs):
            full_costs[(metric, *kept)] = cost
        self.accumulate(scope, full_value, full_costs)

    def where(self, scope: tuple[int, ...], kept: Sequence[bool], content: np.ndarray) -> np.ndarray:
        """``content`` over the states of ``scope`` that are on or, where ``kept`` is false, off; 0 for the others.

        Its axes are the first ones of ``scope``; along the others it is constant.
        """
        states = [np.flatnonzero(self.on[v] == stays) for v, stays in zip(scope, kept)]
        table = np.zeros([len(self.on[v]) for v in scope], dtype=content.dtype)
        table[np.ix_(*states)] = content.reshape(content.shape + (1,) * (len(scope) - content.ndim))
        return table

    def forbid(self, scope: tuple[int, ...], where: np.ndarray) -> None:
        """Forbid combinations of states."""
        self.accumulate(scope, np.where(where, FORBIDDEN, 0.0), np.zeros((self.metrics, *where.shape)))

    def accumulate(self, scope: tuple[int, ...], value: np.ndarray, costs: np.ndarray) -> None:
        axes = sorted(range(len(scope)), key=lambda axis: scope[axis])
        value = value.transpose(axes)
        costs = costs.transpose(0, *(axis + 1 for axis in axes))
        known = self.content.setdefault(tuple(sorted(scope)), [np.zeros(value.shape), np.zeros(costs.shape)])
        known[0] = np.maximum(known[0] + value, FORBIDDEN)
        known[1] = known[1] + costs


def _add_when_removed(
    tables: _Tables,
    problem: PruningProblem,
    term: ProblemTerm,
    witness: list[int],
    value_unit: float,
    metrics: Sequence[str],
    cost_units: Sequence[float],
) -> float:
    """Add a term that counts while its block is removed and the block's parent is kept; returns its least value."""
    assert term.block is not None  # checked by the problem
    parent = problem.blocks[term.block].parent
    scope, kept = [*term.dimensions, witness[term.block]], [True] * len(term.dimensions) + [False]
    if parent is not None and witness[parent] not in term.dimensions:
        scope, kept = [*scope, witness[parent]], [*kept, True]
    variables = tuple(scope)
    value = np.zeros(_shape(problem, term)) if term.value is None else term.value / value_unit
    least = min(0.0, float(value.min()))
    costs = [tables.where(variables, kept, term.costs[m] / unit) for m, unit in zip(metrics, cost_units)]
    # Raised by its least value in every state, so that what is left is >= 0.
    tables.accumulate(variables, tables.where(variables, kept, value) - least, np.stack(costs))
    if term.allowed is not None:
        tables.forbid(variables, tables.where(variables, kept, ~term.allowed))
    return least


def _shape(problem: PruningProblem, term: ProblemTerm) -> tuple[int, ...]:
    return tuple(len(problem.dimensions[d].options) for d in term.dimensions)


def _spanning_tree(variables: list[int], terms: tuple[ProblemTerm, ...]) -> list[tuple[int, int]]:
    """Edges that connect the variables, along common terms where there are any."""
    reached, rest, edges = [variables[0]], list(variables[1:]), []
    scopes = [set(term.dimensions) for term in terms]
    while rest:
        edge = next(
            ((u, v) for u in reached for v in rest if any({u, v} <= scope for scope in scopes)),
            (reached[0], rest[0]),
        )
        edges.append(edge)
        reached.append(edge[1])
        rest.remove(edge[1])
    return edges
