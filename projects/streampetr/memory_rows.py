"""The memory after a frame against the reference's, where queries that score alike may have changed places.

The head keeps its best queries, best first. Devices round differently, so two queries whose scores differ by less than
rounding come in either order, and at the end of the selection either of them may be kept. Both are right. A row is
therefore compared with the query that it holds, and that query must have scored, up to rounding, what its place asks
for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from mdp_mmdet3d.runtime.stream import HostMemory

SIGMOID_ROUNDINGS = 4
"""float32 roundings of a probability between two implementations of the sigmoid."""


@dataclass(frozen=True)
class Candidates:
    """The queries of one frame, of which the best go into the memory.

    Attributes:
        logits: (Q, C) class logits of the last level.
        boxes: (Q, 10) box codes of the last level: centre in metres of the lidar frame first, velocity last.
        embedding: (Q, D) post-normed output of the last decoder layer.
    """

    logits: np.ndarray
    boxes: np.ndarray
    embedding: np.ndarray


@dataclass(frozen=True)
class MemoryDifference:
    """A memory against the reference's.

    Attributes:
        largest: Largest absolute difference of a number: embedding, metres, metres per second, seconds, pose entries.
            Infinite if the memory has another shape.
        near_ties: New rows for whose place more than one query scored enough.
    """

    largest: float
    near_ties: int


def best_scores(logits: np.ndarray) -> np.ndarray:
    """What queries are ranked by: their best class probability, (..., Q) float64 of logits (..., Q, C)."""
    return 1.0 / (1.0 + np.exp(-np.asarray(logits, np.float64).max(axis=-1)))


def tie_margin(found: np.ndarray, expected: np.ndarray) -> float:
    """How far apart two scores may lie, in probability, that two runs may rank differently; measured on these runs.

    If no score differs by more than d between the runs, the query at any place of one run scores within 2 d of that
    place in the other.

    Args:
        found: Logits (..., Q, C) of one run.
        expected: Those of the other.
    """
    between = float(np.abs(best_scores(found) - best_scores(expected)).max())
    return 2 * between + SIGMOID_ROUNDINGS * float(np.finfo(np.float32).eps)


def pair_rows(
    found: np.ndarray, candidates: np.ndarray, scores: np.ndarray, margin: float
) -> tuple[np.ndarray, np.ndarray]:
    """The candidate that each row of a selection holds: one to one, closest in content, and good enough for its place.

    Args:
        found: (K, D) selected rows, best first.
        candidates: (Q, D) what was selected from, Q >= K.
        scores: (Q,) of the candidates.
        margin: A candidate may be in a place if its score is within this of the score that belongs there.

    Returns:
        Index of the candidate of each row (K,), and how many candidates were good enough for its place (K,).
    """
    places = np.sort(scores)[::-1][: len(found)]
    allowed = np.abs(scores[None] - places[:, None]) <= margin
    rows, columns = np.nonzero(allowed)
    cost = np.full(allowed.shape, np.inf)
    # A number that is not finite matches nothing well; the difference shows it.
    gaps = np.nan_to_num(np.abs(found[rows] - candidates[columns]).sum(axis=1, dtype=np.float64), nan=1e12, posinf=1e12)
    cost[rows, columns] = np.minimum(gaps, 1e12)
    return linear_sum_assignment(cost)[1], allowed.sum(axis=1)


def memory_difference(
    found: HostMemory, expected: HostMemory, queries: Candidates, new: int, margin: float
) -> MemoryDifference:
    """Compare the memory after a frame that both runs started with the same memory.

    Args:
        found: Of the engines.
        expected: Of the reference; rows behind the new ones are compared in place.
        queries: The reference's queries of this frame, in its lidar coordinates, which are those of ``found.anchor``.
        new: Rows K that a frame adds; they come first.
        margin: See `tie_margin`.
    """
    expected = _moved(expected, found.anchor)
    fields = ("embedding", "reference_point", "egopose", "velo", "clock")
    if any(getattr(found, name).shape != getattr(expected, name).shape for name in fields):
        return MemoryDifference(np.inf, 0)
    rows = np.concatenate([found.embedding[0, :new], found.reference_point[0, :new], found.velo[0, :new]], axis=1)
    contents = np.concatenate([queries.embedding, queries.boxes[:, :3], queries.boxes[:, -2:]], axis=1)
    held, choices = pair_rows(rows, contents, best_scores(queries.logits), margin)
    gaps = [rows - contents[held], found.egopose - expected.egopose, found.clock - expected.clock]
    for name in ("embedding", "reference_point", "velo"):
        gaps.append(getattr(found, name)[:, new:] - getattr(expected, name)[:, new:])
    # NaN passes through, so that no comparison with a tolerance holds.
    largest = float(np.max([np.abs(gap).max(initial=0.0) for gap in gaps]))
    return MemoryDifference(largest, int((choices > 1).sum()))


def _moved(memory: HostMemory, anchor: np.ndarray) -> HostMemory:
    """The same memory, stored in the frame ``anchor``."""
    move = np.linalg.solve(anchor, memory.anchor)
    points = memory.reference_point.astype(np.float64) @ move[:3, :3].T + move[:3, 3]
    return replace(memory, reference_point=points, egopose=move @ memory.egopose.astype(np.float64), anchor=anchor)
