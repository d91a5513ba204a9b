"""Exact label search: dynamic programming over the elimination tree, pruned by Lagrangian completion bounds.

A label is a partial plan below one bucket. It is a row of integers that add up when partial plans are joined:
value and costs in fixed point, so that ties are exact and no order of summation matters, and the chosen states
packed into bit fields (`Packing`).
"""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import dataclass

import numpy as np

from mdp_mmdet3d.solver.dominance import LARGEST_VALUE, best_row, thinned, undominated
from mdp_mmdet3d.solver.elimination import Bucket, Elimination, Sweep
from mdp_mmdet3d.solver.packing import Packing

RESOLUTION = 2.0**45
"""Fixed-point units of the largest value and of one scaled cost: the sums of hundreds of terms stay exact to 1e-11."""
_LARGEST_ENTRY = 4.0  # more than any plan within the limits is worth or costs
_ROUNDING = 1e-10
_PAIRS_PER_LABEL, _PAIRS_AT_ONCE = 16, 200_000


class OutOfRoomError(Exception):
    """A search would hold more labels or take longer than allowed."""


@dataclass(frozen=True)
class CompletionBound:
    """The linear function ``weight * value - multipliers @ costs`` and its sweep."""

    weight: float
    multipliers: np.ndarray
    sweep: Sweep


@dataclass(frozen=True)
class Labels:
    """Labels grouped by state of a separator (or by table cell).

    Attributes:
        group: ``(N,)`` group of each label.
        rows: ``(N, 1 + M + W)`` value, costs, packed states.
        slack: ``(N, J)`` per completion bound: in a message, how far the label is below its group's best
            (a deficit); during a join, how much may still be lost.
    """

    group: np.ndarray
    rows: np.ndarray
    slack: np.ndarray

    def __len__(self) -> int:
        return len(self.group)

    @property
    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The fields in order."""
        return self.group, self.rows, self.slack

    def take(self, index: np.ndarray) -> Labels:
        """The labels at ``index``."""
        return Labels(self.group[index], self.rows[index], self.slack[index])


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found.

    Attributes:
        row: Best row within the limits, None where none was met.
        complete: Nothing was dropped for want of room: no plan at or above the target is better than `row`.
        labels: Largest number of labels in one join.
    """

    row: np.ndarray | None
    complete: bool
    labels: int


class LabelSearch:
    """Searches the plans that are worth at least a target.

    Plans are ordered by value, then lower costs, then lexicographically larger options and kept flags.

    Args:
        tree: Elimination of the reduced, scaled graph.
        limits: ``(M,)`` limits on the graph's costs, tolerance included.
        bounds: Completion bounds; the first one orders the labels.
        largest_value: Power of two that no plan's value exceeds.
        target: Value below which plans are of no interest.
        room: Largest number of labels that a join may leave.
        beam: Drop labels for want of room instead of giving up.
        deadline: `time.perf_counter` at which to give up.
    """

    def __init__(
        self,
        tree: Elimination,
        packing: Packing,
        limits: np.ndarray,
        bounds: list[CompletionBound],
        largest_value: float,
        target: float,
        room: int,
        beam: bool,
        deadline: float,
    ) -> None:
        self.tree = tree
        self.bounds = bounds
        self.target = target
        self.value_resolution = RESOLUTION / largest_value
        self.room = room
        self.beam = beam
        self.deadline = deadline
        self.metrics = len(limits)
        self.packing = packing
        self.limit_units = np.floor(limits * RESOLUTION).astype(np.int64)
        self._tables = [_fixed_point(factor.value / largest_value, factor.costs) for factor in tree.graph.factors]
        self._floors = np.array(
            [
                bound.weight * target - float(bound.multipliers @ limits) - _ROUNDING * (1.0 + bound.multipliers.sum())
                for bound in bounds
            ]
        )
        self._weights = np.array([[bound.weight * largest_value, *(-bound.multipliers)] for bound in bounds]).T
        self._weights /= RESOLUTION
        self._complete = True
        self._largest = 0

    def run(self) -> SearchOutcome:
        """Search; raises `OutOfRoomError` where an exact search needs more room."""
        messages: list[Labels | None] = []
        for index, bucket in enumerate(self.tree.buckets):
            labels = self._bucket(index, bucket, messages)
            for view in bucket.children:
                messages[view.source] = None
            messages.append(labels)
        root = messages[-1]
        assert root is not None
        row = best_row(root.rows[(root.rows[:, 1 : 1 + self.metrics] <= self.limit_units).all(axis=1)], self.metrics)
        return SearchOutcome(row, self._complete, self._largest)

    def _bucket(self, index: int, bucket: Bucket, messages: list[Labels | None]) -> Labels:
        shape = self.bounds[0].sweep.joints[index].shape
        beliefs = [bound.sweep.joints[index] + bound.sweep.outer[index] for bound in self.bounds]
        slack = np.stack([belief.ravel() for belief in beliefs], axis=-1) - self._floors
        cells = np.flatnonzero((slack >= 0).all(axis=1))
        places = np.unravel_index(cells, shape)
        rows = np.zeros((len(cells), 1 + self.metrics + self.packing.words), dtype=np.int64)
        rows[:, 1 + self.metrics :] = self.packing.codes[bucket.variable][places[0]]
        for view in bucket.factors:
            rows[:, : 1 + self.metrics] += self._tables[view.source][tuple(places[axis] for axis in view.axes)]
        labels = Labels(np.arange(len(cells)), rows, slack[cells]).take(self._possible(rows))
        children = self._children(bucket, messages, places, shape, labels)
        for position, (cell_group, child) in enumerate(children):
            last = position == len(children) - 1
            if last and index == len(self.tree.buckets) - 1:
                last_join = self._best_of_one_limit if self.metrics == 1 else self._best_of_many_limits
                labels = last_join(labels, cell_group, child)
            elif last:
                labels = self._join(labels, cell_group, child)
            else:
                labels = self._front(self._join(labels, cell_group, child), -1.0)
        group = _flat(places[1:], shape[1:], len(cells))[labels.group]
        kept = undominated(group, labels.rows, self.metrics)
        group, rows = group[kept], labels.rows[kept]
        tops = np.stack([bound.sweep.messages[index].ravel() for bound in self.bounds], axis=-1)
        deficits = tops[group] - rows[:, : 1 + self.metrics] @ self._weights
        message = self._fitting(Labels(group, rows, deficits), 1.0)
        return message.take(np.lexsort((message.slack[:, 0], message.group)))

    def _children(
        self,
        bucket: Bucket,
        messages: list[Labels | None],
        places: tuple[np.ndarray, ...],
        shape: tuple[int, ...],
        cells: Labels,
    ) -> list[tuple[np.ndarray, Labels]]:
        """Per child, the group of each cell and the labels, small children first.

        Children over the same variables are joined among themselves, smallest first, until two are left: two large
        halves then meet in a last join, which is cheaper than one list that grows with every child.
        """
        by_scope: dict[tuple[int, ...], list[Labels]] = {}
        for view in bucket.children:
            child = messages[view.source]
            assert child is not None
            by_scope.setdefault(view.axes, []).append(child)
        result = []
        for axes, children in by_scope.items():
            cell_group = _flat(tuple(places[a] for a in axes), tuple(shape[a] for a in axes), len(places[0]))
            if len(children) > 2:
                groups = math.prod(shape[a] for a in axes)
                largest = np.full((groups, len(self.bounds)), -1.0)
                np.maximum.at(largest, cell_group[cells.group], cells.slack)
                children = self._halves(children, largest)
            result += [(cell_group, child) for child in children]
        return sorted(result, key=lambda item: len(item[1]))

    def _halves(self, children: list[Labels], largest: np.ndarray) -> list[Labels]:
        """Two messages that stand for many over the same groups; ``largest`` is ``(G, J)`` slack of a group."""
        heap = [(len(child), position, child) for position, child in enumerate(children)]
        heapq.heapify(heap)
        same = np.arange(len(largest))
        for position in range(len(children), 2 * len(children) - 2):
            small, other = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
            left = Labels(small.group, small.rows, largest[small.group] - small.slack)
            joined = self._front(self._join(left, same, other), -1.0)
            deficit = largest[joined.group] - joined.slack
            order = np.lexsort((deficit[:, 0], joined.group))
            heapq.heappush(heap, (len(joined), position, Labels(joined.group, joined.rows, deficit).take(order)))
        return [item[2] for item in heap]

    def _front(self, labels: Labels, sign: float) -> Labels:
        """Without dominated labels and, in a beam search, no more than there is room for."""
        return self._fitting(labels.take(undominated(labels.group, labels.rows, self.metrics)), sign)

    def _join(self, left: Labels, cell_group: np.ndarray, right: Labels) -> Labels:
        """All sums of a label and a label of its cell's group of the child that the slack allows."""
        first, count = _partners(left, cell_group, right)
        while int(count.sum()) > _PAIRS_PER_LABEL * max(self.room, len(cell_group)):
            if not self.beam:
                raise OutOfRoomError
            self._complete = False
            before = len(left) + len(right)
            left, right = _thinned(left, -1.0, len(left) // 2), _thinned(right, 1.0, len(right) // 2)
            if len(left) + len(right) == before:  # one label per group is the least
                raise OutOfRoomError
            first, count = _partners(left, cell_group, right)
        ends = np.cumsum(count)
        parts, size, begin = [], 0, 0
        while begin < len(left):
            # Some pairs at a time, at least one label's: what the bounds exclude never fills the memory.
            done = int(ends[begin - 1]) if begin else 0
            end = max(int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")), begin + 1)
            parts.append(self._pairs(left, right, first, count, begin, end))
            begin = end
            size += len(parts[-1])
            if (size > self.room and not self.beam) or time.perf_counter() > self.deadline:
                raise OutOfRoomError
        self._largest = max(self._largest, size)
        if not parts:
            return left
        return Labels(*(np.concatenate(fields) for fields in zip(*(part.parts for part in parts))))

    def _pairs(self, left: Labels, right: Labels, first: np.ndarray, count: np.ndarray, begin: int, end: int) -> Labels:
        count = count[begin:end]
        from_left = np.repeat(np.arange(begin, end), count)
        from_right = np.arange(len(from_left)) + np.repeat(first[begin:end] - (np.cumsum(count) - count), count)
        slack = left.slack[from_left] - right.slack[from_right]
        allowed = np.flatnonzero((slack >= 0).all(axis=1))
        from_left, from_right = from_left[allowed], from_right[allowed]
        joined = Labels(left.group[from_left], left.rows[from_left] + right.rows[from_right], slack[allowed])
        return joined.take(self._possible(joined.rows))

    def _possible(self, rows: np.ndarray) -> np.ndarray:
        """Positions of the rows that no limit excludes yet."""
        within = (rows[:, 1 : 1 + self.metrics] <= self.limit_units).all(axis=1)
        return np.flatnonzero(within & (rows[:, 0] < LARGEST_VALUE))

    def _best_of_one_limit(self, left: Labels, cell_group: np.ndarray, right: Labels) -> Labels:
        """Per label the best partner within the single limit: the costliest, as labels are undominated."""
        order = np.lexsort((right.rows[:, 1], right.group))
        keys = _cost_keys(right.group[order], right.rows[order, 1])
        group = cell_group[left.group]
        rest = self.limit_units[0] - left.rows[:, 1]
        position = np.searchsorted(keys, _cost_keys(group, np.maximum(rest, 0)), side="right") - 1
        found = (rest >= 0) & (position >= 0)
        found[found] = right.group[order[position[found]]] == group[found]
        partner = order[position[found]]
        return Labels(left.group[found], left.rows[found] + right.rows[partner], left.slack[found])

    def _best_of_many_limits(self, left: Labels, cell_group: np.ndarray, right: Labels) -> Labels:
        """The best sum; each one found raises the target for the labels that follow."""
        left = left.take(np.argsort(-left.slack[:, 0], kind="stable"))
        best, target = left.take(np.zeros(0, dtype=np.int64)), self.target
        weights = np.array([bound.weight for bound in self.bounds])
        begin = 0
        while begin < len(left):
            raised = Labels(left.group, left.rows, left.slack - weights * (target - self.target))
            first, count = _partners(raised, cell_group, right)
            ends = np.cumsum(count[begin:])
            end = begin + max(int(np.searchsorted(ends, _PAIRS_AT_ONCE, side="right")), 1)
            pairs = self._pairs(raised, right, first, count, begin, end)
            self._largest = max(self._largest, len(pairs))
            both = Labels(*(np.concatenate(parts) for parts in zip(best.parts, pairs.parts)))
            row = best_row(both.rows, self.metrics)
            if row is not None:
                best = both.take(np.flatnonzero((both.rows == row).all(axis=1))[:1])
                target = max(target, float(row[0]) / self.value_resolution)
            begin = end
            if time.perf_counter() > self.deadline:
                raise OutOfRoomError
        return best

    def _fitting(self, labels: Labels, sign: float) -> Labels:
        """In a beam search, at most `room` labels; ``sign`` as in `_thinned`."""
        if not self.beam or len(labels) <= self.room:
            return labels
        self._complete = False
        return _thinned(labels, sign, self.room)


def _fixed_point(value: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """``(..., 1 + M)`` integers; entries that no plan within the limits can have are capped."""
    table = np.stack([value, *costs], axis=-1)
    return np.rint(np.clip(table, 0.0, _LARGEST_ENTRY) * RESOLUTION).astype(np.int64)


def _thinned(labels: Labels, sign: float, quota: int) -> Labels:
    """About ``quota`` labels; ``sign`` says whether a small (1) or a large (-1) slack is good."""
    return labels.take(np.sort(thinned(labels.group, labels.rows[:, 1], sign * labels.slack[:, 0], quota)))


def _flat(places: tuple[np.ndarray, ...], shape: tuple[int, ...], count: int) -> np.ndarray:
    return np.ravel_multi_index(places, shape) if places else np.zeros(count, dtype=np.int64)


def _cost_keys(group: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Integers that order by group, then cost; costs beyond the limit are never asked for and capped."""
    return group * np.int64(2**50) + np.minimum(cost, 2**50 - 1)


def _partners(left: Labels, cell_group: np.ndarray, right: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Per label of ``left``, where its partners in ``right`` start and how many may be within its slack."""
    deficit = right.slack[:, 0]
    slack = left.slack[:, 0]
    unit = max(float(deficit.max(initial=0.0)), 1e-300)
    keys = 2.0 * right.group + np.clip(deficit / unit, 0.0, 1.0)
    group = cell_group[left.group]
    first = np.searchsorted(keys, 2.0 * group - 0.5)
    # The keys' rounding must not lose a partner; the exact test follows in the join.
    last = np.searchsorted(keys, 2.0 * group + np.minimum(slack / unit + 1e-6, 1.0), side="right")
    return first, np.maximum(last - first, 0)
