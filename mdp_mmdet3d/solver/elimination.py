"""Exact maximisation over the group graph: max-plus messages along an elimination tree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mdp_mmdet3d.solver.graph import FactorGraph

LARGEST_TABLES = 40_000_000
"""Entries of 8 bytes; a sweep and its completion hold about three times as many."""

_CENTRE_CANDIDATES, _SMALL_TABLES = 12, 1_000_000


@dataclass(frozen=True)
class View:
    """How a table is laid out over the axes (variable, *separator) of a bucket.

    Attributes:
        source: Index of the table.
        axes: Per axis of the table, the bucket's axis.
        permutation: Order of the table's axes among the bucket's.
        index: Inserts an axis of size 1 where the table has none.
    """

    source: int
    axes: tuple[int, ...]
    permutation: tuple[int, ...]
    index: tuple[slice | None, ...]

    @classmethod
    def make(cls, source: int, scope: tuple[int, ...], target: tuple[int, ...]) -> View:
        """View of table ``source`` over ``scope`` among the axes ``target``."""
        return cls(
            source,
            tuple(target.index(v) for v in scope),
            tuple(scope.index(v) for v in target if v in scope),
            tuple(slice(None) if v in scope else None for v in target),
        )

    def of(self, tables: Sequence[np.ndarray]) -> np.ndarray:
        """The table, broadcastable to the bucket's axes."""
        return tables[self.source].transpose(self.permutation)[self.index]

    def reduced(self, array: np.ndarray) -> np.ndarray:
        """Largest entries of an array over the bucket's axes, as a table over the view's own scope."""
        others = tuple(axis for axis in range(array.ndim) if axis not in self.axes)
        result = array.max(axis=others) if others else array
        return result.transpose(np.argsort(self.permutation))


@dataclass(frozen=True)
class Bucket:
    """What happens when one variable is eliminated.

    Attributes:
        variable: The variable.
        separator: Later variables that its tables involve, increasing.
        factors: Tables of the graph that are used up here.
        children: Messages of earlier buckets that are used up here.
    """

    variable: int
    separator: tuple[int, ...]
    factors: tuple[View, ...]
    children: tuple[View, ...]


class TooWideError(Exception):
    """The tables of an elimination would be too large: too many dimensions depend on each other."""


class Elimination:
    """Elimination of a graph's variables; the last bucket is the root of one tree.

    Args:
        graph: What to eliminate.
        root: Variable to eliminate last; by default the order alone decides.

    Attributes:
        size: Entries of all tables together.

    Raises:
        TooWideError: They would be more than `LARGEST_TABLES`.
    """

    def __init__(self, graph: FactorGraph, root: int | None = None) -> None:
        self.graph = graph
        self.buckets = _buckets(graph, elimination_order(graph, root))
        self.size = sum(math.prod(graph.sizes[v] for v in (b.variable, *b.separator)) for b in self.buckets)
        if self.size > LARGEST_TABLES:
            raise TooWideError(f"elimination needs {self.size:.3g} table entries")

    def sweep(self, tables: Sequence[np.ndarray]) -> Sweep:
        """Upward messages for ``tables``, one per factor in the graph's axis order."""
        joints: list[np.ndarray] = []
        messages: list[np.ndarray] = []
        sizes = self.graph.sizes
        for bucket in self.buckets:
            shape = (sizes[bucket.variable], *(sizes[v] for v in bucket.separator))
            parts = [view.of(tables) for view in bucket.factors] + [view.of(messages) for view in bucket.children]
            joint = np.zeros((1,) * len(shape))
            for part in sorted(parts, key=np.size):  # small ones first: the full table is written only once
                joint = joint + part
            if joint.shape != shape:
                joint = np.broadcast_to(joint, shape)
            joints.append(joint)
            messages.append(joint.max(axis=0))
        return Sweep(self, joints, messages)

    def sweep_weighted(self, weight: float, multipliers: np.ndarray) -> Sweep:
        """Sweep over ``weight * value - multipliers @ costs``; structures only, whatever the weight."""
        return self.sweep([factor.weighted(weight, multipliers) for factor in self.graph.factors])


class Sweep:
    """The tables of one elimination.

    Attributes:
        joints: Per bucket ``(variable, *separator)``: best sum of everything below it.
        messages: Per bucket ``(*separator)``: the same, maximised over the variable.
    """

    def __init__(self, tree: Elimination, joints: list[np.ndarray], messages: list[np.ndarray]) -> None:
        self.tree = tree
        self.joints = joints
        self.messages = messages

    @property
    def total(self) -> float:
        """The maximum over all assignments."""
        return float(self.messages[-1])

    def assignment(self) -> list[int]:
        """An assignment that reaches the maximum."""
        chosen = [0] * len(self.tree.graph.sizes)
        for bucket, joint in zip(reversed(self.tree.buckets), reversed(self.joints)):
            column = joint[(slice(None), *(chosen[v] for v in bucket.separator))]
            chosen[bucket.variable] = int(np.argmax(column))
        return chosen

    @cached_property
    def outer(self) -> list[np.ndarray]:
        """Per bucket ``(*separator)``: best sum of everything that is not below it."""
        outer: list[np.ndarray] = [np.zeros(())] * len(self.joints)
        for index in reversed(range(len(self.joints))):
            children = self.tree.buckets[index].children
            if children:
                belief = self.joints[index] + outer[index]
                for view in children:
                    outer[view.source] = view.reduced(belief - view.of(self.messages))
        return outer

    @cached_property
    def state_marginals(self) -> list[np.ndarray]:
        """Per variable and state, the maximum over all assignments that use the state."""
        marginals: list[np.ndarray] = [np.zeros(0)] * len(self.joints)
        for bucket, joint, outer in zip(self.tree.buckets, self.joints, self.outer):
            belief = joint + outer
            marginals[bucket.variable] = belief.max(axis=tuple(range(1, belief.ndim)))
        return marginals


def balanced(graph: FactorGraph) -> Elimination:
    """Elimination rooted at the central variable, unless that makes much larger tables."""
    try:
        rooted = Elimination(graph, central_variable(graph))
        if rooted.size < _SMALL_TABLES:
            return rooted
    except TooWideError:
        return Elimination(graph)
    plain = Elimination(graph)
    return rooted if rooted.size <= 2 * plain.size else plain


def elimination_order(graph: FactorGraph, root: int | None = None) -> list[int]:
    """Greedy order: always the variable whose elimination makes the smallest table, ``root`` last."""
    sizes = graph.sizes
    neighbours = _neighbours(graph)
    scores = {v: math.prod(1.0 + sizes[u] for u in neighbours[v]) for v in range(len(sizes)) if v != root}
    order = []
    while scores:
        best = min(scores, key=lambda v: (scores[v], v))
        del scores[best]
        order.append(best)
        clique = neighbours[best] - {best}
        for variable in clique:
            neighbours[variable] |= clique
            neighbours[variable].discard(best)
            if variable in scores:
                scores[variable] = math.prod(1.0 + sizes[u] for u in neighbours[variable])
    return order if root is None else [*order, root]


def central_variable(graph: FactorGraph) -> int | None:
    """The variable without which the graph falls into the most balanced parts, by number of combinations.

    As the root of the elimination it lets searches from all sides meet in the middle.
    """
    neighbours = _neighbours(graph)
    weights = [math.log(size) for size in graph.sizes]
    open_variables = [v for v, size in enumerate(graph.sizes) if size > 1]
    candidates = sorted(open_variables, key=lambda v: (-len(neighbours[v]), v))[:_CENTRE_CANDIDATES]

    def heaviest_part(removed: int) -> float:
        seen, heaviest = {removed}, 0.0
        for start in open_variables:
            if start in seen:
                continue
            stack, weight = [start], 0.0
            seen.add(start)
            while stack:
                variable = stack.pop()
                weight += weights[variable]
                # A variable with one state left connects nothing.
                reached = {v for v in neighbours[variable] if weights[v] > 0} - seen
                seen |= reached
                stack.extend(reached)
            heaviest = max(heaviest, weight)
        return heaviest

    return min(candidates, key=lambda v: (heaviest_part(v), v), default=None)


def _neighbours(graph: FactorGraph) -> list[set[int]]:
    """Per variable, itself and the variables that share a table with it."""
    neighbours: list[set[int]] = [{v} for v in range(len(graph.sizes))]
    for factor in graph.factors:
        for variable in factor.scope:
            neighbours[variable].update(factor.scope)
    return neighbours


def _buckets(graph: FactorGraph, order: list[int]) -> tuple[Bucket, ...]:
    position = {variable: index for index, variable in enumerate(order)}
    factors: list[list[int]] = [[] for _ in order]
    children: list[list[int]] = [[] for _ in order]
    for index, factor in enumerate(graph.factors):
        factors[min(position[v] for v in factor.scope)].append(index)
    buckets: list[Bucket] = []
    for index, variable in enumerate(order):
        scopes = [graph.factors[f].scope for f in factors[index]]
        scopes += [buckets[c].separator for c in children[index]]
        separator = tuple(sorted({v for scope in scopes for v in scope} - {variable}))
        target = (variable, *separator)
        buckets.append(
            Bucket(
                variable,
                separator,
                tuple(View.make(f, graph.factors[f].scope, target) for f in factors[index]),
                tuple(View.make(c, buckets[c].separator, target) for c in children[index]),
            )
        )
        # Independent parts meet in the last bucket.
        if index < len(order) - 1:
            children[min((position[v] for v in separator), default=len(order) - 1)].append(index)
    return tuple(buckets)
