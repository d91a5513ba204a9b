"""torch-pruning's search for coupled channels with an index: its own compares every new member with all before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch_pruning as tp
from torch_pruning.dependency import graph as tp_graph


class IndexedGroup(tp.Group):
    """The same members in the same order; towers that several feature levels share have thousands of them."""

    def __init__(self) -> None:
        super().__init__()
        self._members: set[tuple[Any, ...]] = set()
        self._places: dict[tuple[Any, Any], int] = {}

    def add_dep(self, dep: Any, idxs: list[Any]) -> None:
        """Append a member."""
        super().add_dep(dep, idxs)
        self._members.add((dep.target, dep.handler, tuple(idxs)))
        self._places.setdefault((dep.target, dep.handler), len(self) - 1)

    def has_pruning_op(self, dep: Any, idxs: list[Any]) -> bool:
        """Whether the same cut of the same module is a member."""
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
def indexed_groups() -> Iterator[None]:
    """Let torch-pruning make groups of this kind."""
    before = tp_graph.Group
    tp_graph.Group = IndexedGroup
    try:
        yield
    finally:
        tp_graph.Group = before
