"""Counts of a concatenation: which sums its parts can have, on a short list of options. Plain numpy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

MAX_OPTIONS = 16
"""Options of a sum dimension; latency is measured at each of them, and tables grow with them."""


def sum_options(sums: Iterable[int], *, multiple: int = 1, limit: int = MAX_OPTIONS) -> tuple[int, ...]:
    """Options for a dimension that stands for a sum: each attainable sum or, where these are many, some larger ones.

    A sum is priced at the smallest option that is not below it, so a plan is never cheaper in the tables than it is.
    The smallest and the largest sum are always options; the others are evenly spread among the attainable ones.

    Args:
        sums: Attainable sums, >= 0.
        multiple: Round up to multiples of this number first, the largest sum excepted: the grid that is measured.
        limit: Largest number of options, at least 2.

    Returns:
        Increasing counts; the last one is the largest sum.
    """
    if limit < 2 or multiple < 1:
        raise ValueError(f"a sum needs at least 2 options and a multiple >= 1, got {limit} and {multiple}")
    attainable = np.unique(np.asarray(list(sums), dtype=np.int64))
    if not len(attainable) or attainable[0] < 0:
        raise ValueError(f"sums must be counts >= 0 and at least one, got {attainable.tolist()}")
    rounded = np.unique(np.minimum(-(-attainable // multiple) * multiple, attainable[-1]))
    if len(rounded) > limit:
        rounded = rounded[np.unique(np.linspace(0, len(rounded) - 1, limit).astype(np.int64))]
    return tuple(int(count) for count in rounded)


def attainable_sums(*parts: Sequence[int], fixed: int = 0) -> list[int]:
    """All sums of one count of each part and ``fixed``, increasing."""
    sums = np.array([fixed])
    for counts in parts:
        sums = np.unique(sums[:, None] + np.asarray(counts, dtype=np.int64))
    return sums.tolist()


def sum_allowed(*parts: Sequence[int], options: Sequence[int], fixed: int = 0) -> np.ndarray:
    """Which combinations of counts and option agree: the option is the smallest one not below the sum.

    Args:
        *parts: Counts that each part may have.
        options: Counts of the sum dimension, increasing.
        fixed: Count that is added always.

    Returns:
        Boolean, one axis per part, then one for ``options``.

    Raises:
        ValueError: A sum exceeds the largest option.
    """
    sums = np.array(fixed)
    for counts in parts:
        sums = np.add.outer(sums, np.asarray(counts, dtype=np.int64))
    if sums.max() > options[-1]:
        raise ValueError(f"the sum {sums.max()} is above the largest option {options[-1]}")
    chosen = np.searchsorted(np.asarray(options), sums, side="left")
    return np.asarray(chosen[..., None] == np.arange(len(options)))
