"""Repair sees frames spread over the data, and other ones than losses are measured on."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from torch.utils.data import DataLoader

from mdp_mmdet3d.datasets.spread import STREAM_FRAMES, spread_batches, spread_pieces


class Items:
    """A data set of its item numbers."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> int:
        return item


class Streams(Items):
    """The same in scenes of these lengths."""

    def __init__(self, *lengths: int) -> None:
        super().__init__(sum(lengths))
        ends = np.cumsum(lengths).tolist()
        self.sequences = [range(end - length, end) for end, length in zip(ends, lengths)]


def test_images_come_evenly_from_the_second_half() -> None:
    """Sorted by class, the first images would be of one class."""
    items = list(chain(*spread_pieces(Items(1000), 6)))
    assert items == [500, 600, 700, 799, 899, 999]


@pytest.mark.parametrize("count", [1, 5, 9, 10, 11, 40])
def test_as_many_as_wanted_or_all_there_are(count: int) -> None:
    """The first half follows where the second is too small."""
    items = list(chain(*spread_pieces(Items(10), count)))
    assert len(items) == min(count, 10)
    assert items == sorted(set(items))
    assert {*range(5, 10)} <= set(items) or count < 5


@pytest.mark.parametrize("count", [1, 3 * STREAM_FRAMES, 500])
def test_streams_come_from_their_start(count: int) -> None:
    """A memory needs the frames before."""
    data = Streams(*[40] * 12)
    pieces = spread_pieces(data, count)
    assert all(piece.start in {each.start for each in data.sequences} for piece in pieces)
    assert all(len(piece) == STREAM_FRAMES for piece in pieces)
    assert sum(map(len, pieces)) >= min(count, 12 * STREAM_FRAMES)
    if count <= 6 * STREAM_FRAMES:
        assert all(piece.start >= 6 * 40 for piece in pieces)


def test_a_stride_takes_more_of_a_stream() -> None:
    """As many frames of a stream count, and those between are there."""
    pieces = spread_pieces(Streams(*[100] * 8), 2 * STREAM_FRAMES, stride=3)
    assert [len(piece) for piece in pieces] == [3 * STREAM_FRAMES] * 2


def test_short_streams_and_empty_ones() -> None:
    """Nothing is invented."""
    assert [list(piece) for piece in spread_pieces(Streams(3, 0, 2), 100)] == [[0, 1, 2], [3, 4]]
    assert spread_pieces(Items(0), 4) == []


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_processes_share_the_pieces(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """Together they see what one would; with fewer pieces than processes all see the same."""
    data = Streams(*[20] * 8)
    loader = DataLoader(data, batch_size=2)
    found = []
    for rank in range(processes):
        monkeypatch.setattr("mdp_mmdet3d.datasets.spread.get_dist_info", lambda rank=rank: (rank, processes))
        found.append([int(item) for batch in spread_batches(loader, 3 * STREAM_FRAMES) for item in batch])
    one = list(chain(*spread_pieces(data, 3 * STREAM_FRAMES)))
    if processes <= 3:
        assert sorted(chain(*found)) == one
        assert all(part == sorted(part) for part in found)
    else:
        assert all(part == one for part in found)
