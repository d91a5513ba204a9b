"""Which labels of a group another label makes useless. Rows are integers: value, M costs, packed plan."""

from __future__ import annotations

import numpy as np

_VALUE_BITS = 50
LARGEST_VALUE = 2**_VALUE_BITS
"""Values of rows are below this number."""
_NEIGHBOURS = 8


def undominated(group: np.ndarray, rows: np.ndarray, metrics: int) -> np.ndarray:
    """Positions of the labels that are kept, by group and growing first cost.

    A label is dropped where another one of its group is at least as good in value and every cost and better in
    one of them or, all being equal, lexicographically larger. With several costs some dominated labels stay.

    Args:
        group: ``(N,)`` integers >= 0.
        rows: ``(N, 1 + M + W)``.
        metrics: M.
    """
    if len(group) < 2:
        return np.arange(len(group))
    return _front(group, rows) if metrics == 1 else _thinned_front(group, rows, metrics)


def best_row(rows: np.ndarray, metrics: int) -> np.ndarray | None:
    """The row with the largest value, then smallest costs, then largest packed plan; None without rows."""
    if not len(rows):
        return None
    signs = np.array([1] + [-1] * metrics + [1] * (rows.shape[1] - 1 - metrics))
    return rows[np.lexsort((rows * signs).T[::-1])[-1]]


def thinned(group: np.ndarray, cost: np.ndarray, badness: np.ndarray, quota: int) -> np.ndarray:
    """About ``quota`` positions: per group an equal number of cost intervals, the least bad label of each."""
    groups, dense = np.unique(group, return_inverse=True)
    intervals = max(quota // len(groups), 1)
    low = np.full(len(groups), np.iinfo(np.int64).max)
    high = np.full(len(groups), np.iinfo(np.int64).min)
    np.minimum.at(low, dense, cost)
    np.maximum.at(high, dense, cost)
    width = (high - low + 1).astype(np.float64)
    interval = np.minimum((cost - low[dense]) / width[dense] * intervals, intervals - 1).astype(np.int64)
    order = np.lexsort((cost, badness, interval, dense))
    leads = np.ones(len(order), dtype=bool)
    leads[1:] = (np.diff(dense[order]) != 0) | (np.diff(interval[order]) != 0)
    return order[leads]


def _front(group: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Exact front for one cost: along growing cost only new maxima of the value stay."""
    value, cost = rows[:, 0], rows[:, 1]
    order = np.lexsort((cost, group))
    tied = (np.diff(group[order]) == 0) & (np.diff(cost[order]) == 0)
    if tied.any():
        runs = np.flatnonzero(np.append(tied, False) | np.append(False, tied))
        part = order[runs]
        better_first = [-rows[part, column] for column in range(rows.shape[1] - 1, 1, -1)]
        order[runs] = part[np.lexsort((*better_first, -value[part], cost[part], group[part]))]
    rank = np.cumsum(np.append(0, np.diff(group[order]) != 0))
    kept = []
    # A running maximum per group is one over value + rank * 2**bits; ranks must fit beside the value.
    ranks_at_once = 2 ** (62 - _VALUE_BITS)
    for start in range(0, int(rank[-1]) + 1, ranks_at_once):
        low, high = np.searchsorted(rank, [start, start + ranks_at_once])
        part = order[low:high]
        height = value[part] + ((rank[low:high] - start) << _VALUE_BITS)
        before = np.append(-1, np.maximum.accumulate(height)[:-1])
        kept.append(part[height > before])
    return np.concatenate(kept)


def _thinned_front(group: np.ndarray, rows: np.ndarray, metrics: int) -> np.ndarray:
    """Drops exact ties and what one of a few neighbours in order of value dominates."""
    keys = [-rows[:, column] for column in range(rows.shape[1] - 1, metrics, -1)]
    keys += [rows[:, column] for column in range(metrics, 0, -1)]
    order = np.lexsort((*keys, -rows[:, 0], group))
    for step in range(1, _NEIGHBOURS + 1):
        if len(order) <= step:
            break
        ahead, behind = order[:-step], order[step:]
        dominated = group[ahead] == group[behind]
        for column in range(1, metrics + 1):
            dominated &= rows[ahead, column] <= rows[behind, column]
        order = order[np.append(np.ones(step, dtype=bool), ~dominated)]
    return order
