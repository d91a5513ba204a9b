"""Exact maximisation over the group graph by eliminating one variable after the other (max-plus messages)."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mdp_mmdet3d.solver.graph import FactorGraph


@dataclass(frozen=True)
class View:
    """How a table is laid out over the axes (variable, *separator) of a bucket."""

    source: int
    permutation: tuple[int, ...]
    index: tuple[slice | None, ...]

    @classmethod
    def make(cls, source: int, scope: tuple[int, ...], target: tuple[int, ...]) -> View:
        """View of table ``source`` over ``scope`` among the axes ``target``."""
        present = [v for v in target if v in scope]
        return cls(source, tuple(scope.index(v) for v in present),
                   tuple(slice(None) if v in scope else None for v in target))

    def of(self, tables: Sequence[np.ndarray]) -> np.ndarray:
        """The table with one axis per target axis, of size 1 where it does not depend on it."""
        return tables[self.source].transpose(self.permutation)[self.index]


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


class Elimination:
    """Elimination of a graph's variables in its order; one instance serves any multipliers."""

    def __init__(self, graph: FactorGraph) -> None:
        self.graph = graph
        self.buckets = _buckets(graph)
        self.joint: list[np.ndarray] = []
        self.messages: list[np.ndarray] = []

    def maximise(self, tables: Sequence[np.ndarray]) -> float:
        """Largest sum of ``tables`` (one per factor, in the graph's axis order) over all assignments."""
        self.joint, self.messages = [], []
        total = 0.0
        sizes = self.graph.sizes
        for bucket in self.buckets:
            joint = np.zeros((sizes[bucket.variable], *(sizes[v] for v in bucket.separator)))
            for view in bucket.factors:
                joint += view.of(tables)
            for view in bucket.children:
                joint += view.of(self.messages)
            self.joint.append(joint)
            self.messages.append(joint.max(axis=0))
            if not bucket.separator:
                total += float(self.messages[-1])
        return total

    def best_assignment(self) -> list[int]:
        """An assignment that reaches the last maximum."""
        chosen = [0] * len(self.graph.sizes)
        for bucket, joint in zip(reversed(self.buckets), reversed(self.joint)):
            column = joint[(slice(None), *(chosen[v] for v in bucket.separator))]
            chosen[bucket.variable] = int(np.argmax(column))
        return chosen


def _buckets(graph: FactorGraph) -> tuple[Bucket, ...]:
    position = {variable: index for index, variable in enumerate(graph.order)}
    factors: list[list[int]] = [[] for _ in position]
    children: list[list[int]] = [[] for _ in position]
    for index, factor in enumerate(graph.factors):
        factors[min(position[v] for v in factor.scope)].append(index)
    buckets: list[Bucket] = []
    for index, variable in enumerate(graph.order):
        scopes = [graph.factors[f].scope for f in factors[index]]
        scopes += [buckets[c].separator for c in children[index]]
        separator = tuple(sorted({v for scope in scopes for v in scope} - {variable}))
        target = (variable, *separator)
        buckets.append(Bucket(
            variable, separator,
            tuple(View.make(f, graph.factors[f].scope, target) for f in factors[index]),
            tuple(View.make(c, buckets[c].separator, target) for c in children[index]),
        ))
        if separator:
            children[min(position[v] for v in separator)].append(index)
    return tuple(buckets)
