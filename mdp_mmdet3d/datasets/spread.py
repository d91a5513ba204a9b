"""Which frames of a data set repair sees: spread over its second half. Losses are measured on its first ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
from mmengine.dist import get_dist_info
from torch.utils.data import DataLoader, Subset

STREAM_FRAMES = 8
"""Frames that are used of a stream, from its start: neighbours resemble each other, another scene tells more."""


def spread_pieces(dataset: Any, count: int, stride: int = 1) -> list[range]:
    """Items of a data set, evenly spread over its second half; over all of it where that has too few.

    So that a plan is judged on other data than its repair has seen, where there is enough.

    Args:
        dataset: Has a length; ``sequences``, ranges of items in order, where it holds streams.
        count: Items wanted; fewer where the data set has no more.
        stride: Every so manyth item of a stream is used.

    Returns:
        Pieces in the order of the data set: the first items of a stream, those between included, or one item.
    """
    if hasattr(dataset, "sequences"):
        streams = [each for each in dataset.sequences if len(each)]
        starts = np.array([each.start for each in streams], dtype=int)
        lengths = np.array([min(len(each), STREAM_FRAMES * stride) for each in streams], dtype=int)
    else:
        starts = np.arange(len(dataset))
        lengths = np.ones_like(starts)
    used = -(-lengths // stride)
    places = np.arange(len(starts))
    half = len(places) // 2
    second = _evenly(places[half:], used, count)
    first = _evenly(places[:half], used, count - int(used[second].sum()))
    return [range(starts[place], starts[place] + lengths[place]) for place in (*first, *second)]


def spread_batches(loader: DataLoader, count: int, stride: int = 1) -> Iterator[Mapping[str, Any]]:
    """The items of `spread_pieces` as ``loader`` makes batches of them; streams item by item.

    Args:
        loader: Of a data set that can be indexed.
        count: Items wanted, of all processes together.
        stride: As for `spread_pieces`.
    """
    pieces = spread_pieces(loader.dataset, count, stride)
    rank, processes = get_dist_info()
    if len(pieces) >= processes:  # else all see the same, which counts alike
        pieces = pieces[rank::processes]
    streams = hasattr(loader.dataset, "sequences")
    return iter(
        DataLoader(
            Subset(loader.dataset, list(chain(*pieces))),
            batch_size=1 if streams else loader.batch_size or 1,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            worker_init_fn=loader.worker_init_fn,
        )
    )


def _evenly(places: np.ndarray, used: np.ndarray, count: int) -> np.ndarray:
    """As few evenly spaced places as have ``count`` items, or all."""
    for number in range(len(places)):
        chosen = places[np.linspace(0, len(places) - 1, number).round().astype(int)]
        if used[chosen].sum() >= count:
            return chosen
    return places
