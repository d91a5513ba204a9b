"""What "equal" means for two engines, two runs, or recorded numbers: equal up to the rounding of float32.

Processors, thread counts and libraries add the same numbers in another order. What that changes is proportional to
the tensor's own scale, so differences are counted in *roundings*: float32 epsilons of its largest magnitude (of each
column, where columns have units of their own). The limits below are for what was computed, not for a processor: on
every instruction set, with one thread and two, right code stays several times below them, and the mistakes of
`tests/streampetr/test_deployment_numerics.py` several times above.

The memory holds the best queries, best first. Rounding may swap neighbours whose scores nearly tie, and at the end of
the selection put one in the other's place; how near is measured on the two runs themselves (`tie_margin`). Rows that
may have swapped are paired; what the last place holds is left out where it is undecided, which few rows may be. A test
that follows a stream for several frames needs a selection without ties at its end: `assert_decided`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from projects.streampetr.memory_rows import best_scores, pair_rows, tie_margin

EPS = float(np.finfo(np.float32).eps)

GEOMETRY = 16
"""Roundings after a few products of matrices."""

LAYER = 32
"""Roundings after one layer, or a sum, in another order."""

NETWORK = 128
"""Roundings after a whole network."""

COLUMNS = 512
"""Roundings after a whole network of each column of box codes: a small velocity is a sum of large terms."""

UNDECIDED = 0.1
"""Share of the rows of a selection that near-ties may leave out of a comparison."""

CLEAR = 4.0
"""How many times the measured margin a gap is that no processor closes."""


def array(value: Any) -> np.ndarray:
    """A tensor or array, in float64 so that the comparison does not round."""
    value = value.detach().cpu() if isinstance(value, torch.Tensor) else value
    return np.asarray(value).astype(np.float64)


def roundings(found: Any, expected: Any, *, columns: bool = False) -> float:
    """Largest difference in float32 epsilons of the largest expected magnitude.

    Args:
        found: Tensor or array.
        expected: Of the same shape.
        columns: Every index of the last axis has a scale of its own.
    """
    found, expected = array(found), array(expected)
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    assert np.isfinite(found).all() and np.isfinite(expected).all(), "not finite"
    axes = tuple(range(expected.ndim - 1)) if columns else None
    gap, scale = (np.abs(value).max(axis=axes, initial=0.0) for value in (found - expected, expected))
    return float(np.max(np.divide(gap, EPS * scale, out=np.where(gap > 0, np.inf, 0.0), where=scale > 0), initial=0.0))


def assert_close(found: Any, expected: Any, limit: float = NETWORK, *, columns: bool = False, what: str = "") -> None:
    """Equal up to ``limit`` roundings; see `roundings`."""
    difference = roundings(found, expected, columns=columns)
    assert difference <= limit, f"{what or 'values'} differ by {difference:.3g} roundings, {limit:g} are allowed"


def assert_same_rows(found: Any, expected: Any, limit: float = NETWORK, *, columns: bool = False) -> None:
    """The same rows (n, D), in whatever order: paired one to one, and each pair equal up to ``limit`` roundings."""
    found, expected = array(found), array(expected)
    held, _ = pair_rows(found, expected, np.zeros(len(expected)), margin=1.0)
    assert_close(found, expected[held], limit, columns=columns, what="paired rows")


def assert_differs(found: Any, expected: Any, limit: float = NETWORK) -> None:
    """Further apart than any rounding: ten times what `assert_close` allows."""
    difference = roundings(found, expected)
    assert difference > 10 * limit, f"values differ by {difference:.3g} roundings only"


def assert_clock(found: Any, expected: Any, epoch: float = 1.6e9) -> None:
    """Times in float64 seconds since 1970, equal to two of its roundings (half a microsecond)."""
    limit = 2 * float(np.finfo(np.float64).eps) * epoch
    worst = float(np.abs(array(found) - array(expected)).max())
    assert worst <= limit, f"times differ by {worst:.3g} s, {limit:.1g} s are allowed"


def assert_decided(found: Any, expected: Any, counts: Sequence[int], aligned: int | None = None) -> None:
    """The best ``counts`` queries are the same on every processor: no near-tie at the end of such a selection.

    Args:
        found: (..., Q, C) logits of one run.
        expected: Those of the other; both rank the queries.
        counts: Sizes of selections that matter, e.g. rows stored and queries propagated.
        aligned: Queries in front that are in the same order in both runs, which the margin is measured on; all by
            default. Those behind may have swapped in the frame before.
    """
    found, expected = array(found), array(expected)
    margin = tie_margin(found[..., :aligned, :], expected[..., :aligned, :])
    ranked = -np.sort(-best_scores(expected), axis=-1)
    for count in counts:
        gap = float((ranked[..., count - 1] - ranked[..., count]).min()) if count < ranked.shape[-1] else np.inf
        assert gap > CLEAR * margin, f"a near-tie decides the best {count}: gap {gap:.2g}, margin {margin:.2g}"


def assert_same_memory(
    found: Any, expected: Any, found_logits: Any, expected_logits: Any, new: int, *, geometry: float = GEOMETRY
) -> None:
    """Two memories after a frame that both started from the same memory.

    Args:
        found: `MemoryState` of a batch, new rows first.
        expected: Likewise.
        found_logits: (B, Q, C) class logits of the last level, which the new rows were selected by.
        expected_logits: Likewise.
        new: Rows that the frame added.
        geometry: Roundings that points and poses may have.
    """
    limits = {"embedding": NETWORK, "reference_point": geometry, "velo": COLUMNS}
    margin = tie_margin(array(found_logits), array(expected_logits))
    ranked = -np.sort(-best_scores(array(expected_logits)), axis=-1)
    assert_clock(found.timestamp, expected.timestamp)
    assert_close(found.egopose, expected.egopose, geometry, what="egopose")
    left_out = 0
    for b, scores in enumerate(ranked):
        ours, theirs = ({k: array(getattr(m, k))[b] for k in limits} for m in (found, expected))
        unit = {k: np.abs(theirs[k]).max(initial=EPS) for k in limits}
        rows = [np.concatenate([m[k][:new] / unit[k] for k in limits], axis=1) for m in (ours, theirs)]
        held, _ = pair_rows(rows[0], rows[1], scores[:new], margin)
        # Rows that tie with the best query that was left out may be that query.
        sure = scores[:new] - scores[new] > margin if new < len(scores) else np.ones(new, bool)
        sure &= sure[held]
        left_out += int((~sure).sum())
        for name, limit in limits.items():
            scale = dict(columns=name == "velo", what=f"{name} of stream {b}")
            order = np.concatenate([held[sure], np.arange(new, len(theirs[name]))])
            kept = np.concatenate([np.flatnonzero(sure), np.arange(new, len(theirs[name]))])
            assert_close(ours[name][kept], theirs[name][order], limit, **scale)
    assert left_out <= UNDECIDED * ranked.shape[0] * new, f"near-ties leave out {left_out} of {ranked.shape[0]}x{new}"
