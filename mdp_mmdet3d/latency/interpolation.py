"""Interpolation between measured widths, with the hardware's staircase taken out first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

Grid = tuple[tuple[np.ndarray, ...], np.ndarray]


@dataclass(frozen=True)
class Staircase:
    """How a runtime's cost of one kind of operator rises with its last width, where that is no straight line.

    Attributes:
        kind: Operators that follow it.
        block: Counts are padded to multiples of this.
        left_over: Cost, in tiles of ``len(left_over)`` blocks, of the blocks beyond whole tiles; the first is 0.
        input_multiple: Counts of the first width between which may be interpolated; others leave the runtime's layout.
        remark: What happens to others, for the error message.
    """

    kind: str
    block: int
    left_over: tuple[float, ...]
    input_multiple: int
    remark: str

    def steps(self, counts: np.ndarray) -> np.ndarray:
        """Relative cost of ``counts``, in tiles; same shape."""
        blocks = -(-np.asarray(counts, dtype=np.int64) // self.block)
        tile = len(self.left_over)
        return blocks // tile + np.array(self.left_over)[blocks % tile]


def measured_grid(entries: Mapping[tuple[int, ...], float]) -> Grid | None:
    """Find the complete rectangular grid among measured points; single extra points are left out.

    A width belongs to the grid if it was measured at every corner of the other axes.

    Args:
        entries: Milliseconds per tuple of widths.

    Returns:
        Increasing coordinates per axis and the values of shape (len(axis_0), len(axis_1), ...); None if even
        the corners are not complete.
    """
    if not entries:
        return None
    ranks = range(len(next(iter(entries))))
    axes = [sorted({widths[rank] for widths in entries}) for rank in ranks]
    while not _complete([(axis[0], axis[-1]) for axis in axes], entries):
        extremes = [
            (_count(entries, axes, rank, axis[end]), rank, end)
            for rank, axis in enumerate(axes)
            if len(axis) > 1
            for end in (0, -1)
        ]
        if not extremes:
            return None
        _, rank, end = min(extremes)
        axes[rank].pop(end)
    corners = [(axis[0], axis[-1]) for axis in axes]
    axes = [
        [width for width in axis if _complete([*corners[:rank], (width,), *corners[rank + 1 :]], entries)]
        for rank, axis in enumerate(axes)
    ]
    while not _complete(axes, entries):
        gaps = [
            (_gap(axes, rank, width, entries), rank, width) for rank, axis in enumerate(axes) for width in axis[1:-1]
        ]
        _, rank, width = max(gaps)
        axes[rank].remove(width)
    values = np.array([entries[widths] for widths in product(*axes)]).reshape([len(axis) for axis in axes])
    return tuple(np.array(axis) for axis in axes), values


def _complete(axes: Sequence[Sequence[int]], entries: Mapping[tuple[int, ...], float]) -> bool:
    return all(widths in entries for widths in product(*axes))


def _count(entries: Mapping[tuple[int, ...], float], axes: Sequence[Sequence[int]], rank: int, width: int) -> int:
    """How many measured points have ``width``, the other widths being on ``axes``."""
    line = [*axes[:rank], [width], *axes[rank + 1 :]]
    return sum(point in entries for point in product(*line))


def _gap(axes: list[list[int]], rank: int, width: int, entries: Mapping[tuple[int, ...], float]) -> float:
    """Share of the grid points with ``width`` that were not measured."""
    line = [*axes[:rank], [width], *axes[rank + 1 :]]
    points = list(product(*line))
    return sum(point not in entries for point in points) / len(points)


def inside(grid: Grid, widths: np.ndarray) -> np.ndarray:
    """Which rows of ``widths`` (N, R) lie within the grid's range: booleans (N,)."""
    axes, _ = grid
    return np.all(
        [(axis[0] <= widths[:, rank]) & (widths[:, rank] <= axis[-1]) for rank, axis in enumerate(axes)],
        axis=0,
    )


def multilinear(grid: Grid, widths: np.ndarray) -> np.ndarray:
    """Multilinear interpolation.

    Args:
        grid: What `measured_grid` returned.
        widths: Points inside the grid, shape (N, R).

    Returns:
        Values, shape (N,).
    """
    axes, values = grid
    lower, fraction = [], []
    for rank, axis in enumerate(axes):
        if len(axis) == 1:
            lower.append(np.zeros(len(widths), dtype=np.int64))
            fraction.append(np.zeros(len(widths)))
            continue
        index = np.clip(np.searchsorted(axis, widths[:, rank], side="right") - 1, 0, len(axis) - 2)
        lower.append(index)
        fraction.append((widths[:, rank] - axis[index]) / (axis[index + 1] - axis[index]))
    result = np.zeros(len(widths))
    for corner in product((0, 1), repeat=len(axes)):
        weight = np.ones(len(widths))
        cell: list[np.ndarray] = []
        for rank, side in enumerate(corner):
            weight = weight * (fraction[rank] if side else 1.0 - fraction[rank])
            cell.append(np.minimum(lower[rank] + side, len(axes[rank]) - 1))
        result += weight * values[tuple(cell)]
    return result
