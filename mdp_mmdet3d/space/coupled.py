"""torch-pruning's search for coupled channels with an index and an end.

Its own compares every new member with all before it, and goes on for ever where a model writes into slices of its
output in place (``boxes[:, 3:6] = boxes[:, 3:6].exp()``): the trace then has a circle that shifts the channels at each
turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch_pruning as tp
from torch_pruning.dependency import graph as tp_graph

TURNS = 256
"""Sets of channels with which one group may reach the same operator."""


class IndexedGroup(tp.Group):
    """The same members in the same order, as long as they do not go in circles.

    Attributes:
        circular: Modules whose groups did; shared by the groups of an `indexed_groups`.
    """

    circular: ClassVar[set[Any]] = set()

    def __init__(self) -> None:
        super().__init__()
        self._turns: Counter[tuple[Any, Any]] = Counter()
        self._members: set[tuple[Any, ...]] = set()
        self._places: dict[tuple[Any, Any], int] = {}

    def add_dep(self, dep: Any, idxs: list[Any]) -> None:
        """Append a member."""
        super().add_dep(dep, idxs)
        self._members.add((dep.target, dep.handler, tuple(idxs)))
        self._turns[dep.target, dep.handler] += 1
        self._places.setdefault((dep.target, dep.handler), len(self) - 1)

    def has_pruning_op(self, dep: Any, idxs: list[Any]) -> bool:
        """Whether the same cut of the same module is a member, or too many others are."""
        if self._turns[dep.target, dep.handler] >= TURNS:
            self.circular.add(self[0].dep.target.module)
            return True
        return (dep.target, dep.handler, tuple(idxs)) in self._members

    def add_and_merge(self, dep: Any, idxs: list[Any]) -> None:
        """Append a member, or its channels to the member that cuts the same module in the same way."""
        place = self._places.get((dep.target, dep.handler))
        if place is None:
            self.add_dep(dep, idxs)
            return
        item = self[place]
        merged: dict[int, Any] = {}
        for index in [*item.idxs, *idxs]:
            merged.setdefault(index.idx, index)
        self[place] = type(item)(dep=item.dep, idxs=list(merged.values()))


@contextmanager
def indexed_groups() -> Iterator[set[Any]]:
    """Let torch-pruning make groups of this kind; the set that is given fills with roots whose groups go in circles."""

    class Group(IndexedGroup):
        circular: ClassVar[set[Any]] = set()

    before = tp_graph.Group
    tp_graph.Group = Group
    try:
        yield Group.circular
    finally:
        tp_graph.Group = before
