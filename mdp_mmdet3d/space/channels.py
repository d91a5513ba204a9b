"""Which channels of which layers must go together, and which of them one count can cut.

Two channels are *tied* if one cannot be cut without the other: an addition ties its operands, a convolution's output
its norm and its readers, a grouped convolution or a group norm all channels of a group. What is tied is an element;
elements that touch the same layers in the same way, one behind the other, make up a dimension.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Axis = tuple[Any, str]  # a layer, and which of its axes


@dataclass(frozen=True)
class Run:
    """Where the elements of a dimension lie along an axis: element ``e`` at ``offset + e * width + [0, width)``."""

    offset: int
    width: int


@dataclass(frozen=True)
class Bundle:
    """Elements that touch the same axes.

    Attributes:
        elements: Their identities, in order.
        runs: Per axis, one run or several (halves of a split that go together); None where they are not ordered runs.
        channels: Per axis, its indices that belong to the bundle, increasing.
    """

    elements: tuple[int, ...]
    runs: dict[Axis, tuple[Run, ...] | None]
    channels: dict[Axis, tuple[int, ...]]


class ChannelTies:
    """A union-find over the channels of every axis."""

    def __init__(self) -> None:
        self._start: dict[Axis, int] = {}
        self._length: dict[Axis, int] = {}
        self._parent: list[int] = []
        self._members: dict[int, dict[Axis, list[int]]] | None = None

    def add(self, axis: Axis, length: int) -> None:
        """Add an axis; one that is there already stays as it is."""
        if axis not in self._start:
            self._start[axis], self._length[axis] = len(self._parent), length
            self._parent += range(len(self._parent), len(self._parent) + length)
            self._members = None

    def length(self, axis: Axis) -> int:
        """Channels of an axis."""
        return self._length[axis]

    def tie(self, axis: Axis, indices: Iterable[int], other: Axis, others: Iterable[int]) -> None:
        """Tie channels of two axes, pair by pair."""
        for index, partner in zip(indices, others, strict=True):
            here, there = self._find(self._start[axis] + index), self._find(self._start[other] + partner)
            self._parent[max(here, there)] = min(here, there)
        self._members = None

    def element(self, axis: Axis, index: int) -> int:
        """The element that a channel belongs to."""
        return self._find(self._start[axis] + index)

    def members(self, element: int) -> dict[Axis, list[int]]:
        """Channels of an element per axis, increasing."""
        if self._members is None:
            self._members = {}
            for axis, start in self._start.items():
                for index in range(self._length[axis]):
                    self._members.setdefault(self._find(start + index), {}).setdefault(axis, []).append(index)
        return self._members[element]

    def bundles(self, axis: Axis, order: Sequence[Axis]) -> list[Bundle]:
        """The elements of an axis by what they touch.

        Args:
            axis: Its channels.
            order: All axes; those of every bundle come in this order.
        """
        kinds: dict[Hashable, list[int]] = {}
        for element in dict.fromkeys(self.element(axis, index) for index in range(self._length[axis])):
            kind = frozenset((a, len(indices)) for a, indices in self.members(element).items())
            kinds.setdefault(kind, []).append(element)
        return [self._bundle(elements, order) for elements in kinds.values()]

    def _bundle(self, elements: Sequence[int], order: Sequence[Axis]) -> Bundle:
        axes = [axis for axis in order if axis in self.members(elements[0])]
        indices = {axis: np.array([self.members(element)[axis] for element in elements]) for axis in axes}
        return Bundle(
            tuple(elements),
            {axis: ordered_runs(found) for axis, found in indices.items()},
            {axis: tuple(sorted(found.ravel().tolist())) for axis, found in indices.items()},
        )

    def _find(self, node: int) -> int:
        parent = self._parent
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node


def ordered_runs(indices: np.ndarray) -> tuple[Run, ...] | None:
    """The runs of elements with the channels ``indices`` (elements, channels of one), None if they are none."""
    cuts = np.flatnonzero((np.diff(indices, axis=1) != 1).any(axis=0)) + 1
    runs = []
    for part in np.split(indices, cuts, axis=1):
        width = part.shape[1]
        expected = part[0, 0] + np.arange(len(part) * width).reshape(len(part), width)
        if not np.array_equal(part, expected):
            return None
        runs.append(Run(int(part[0, 0]), width))
    return tuple(runs)
