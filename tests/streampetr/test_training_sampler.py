"""Streaming batches: slots, sequences, ranks, restarts."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdp_mmdet3d.errors import MdpError
from projects.streampetr import sampler as module
from projects.streampetr.dataset import split_sequences
from projects.streampetr.sampler import SceneSampler, StreamBatchSampler


def make(lengths: list[int], batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0, **kwargs):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    sequences = [range(start, start + length) for start, length in zip(starts, lengths)]
    source = SimpleNamespace(dataset=SimpleNamespace(sequences=sequences), seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "get_dist_info", lambda: (rank, world_size))
        return StreamBatchSampler(source, batch_size, **kwargs)


lengths = st.lists(st.integers(1, 7), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, batch_size=st.integers(1, 3), world_size=st.integers(1, 3), seed=st.integers(0, 5))
def test_columns_follow_whole_sequences_and_share_them_fairly(lengths, batch_size, world_size, seed) -> None:
    slots = batch_size * world_size
    samplers = [make(lengths, batch_size, rank, world_size, seed) for rank in range(world_size)]
    total = slots * sum(lengths)
    columns = []
    for sampler in samplers:
        columns += list(zip(*islice(sampler, total)))
    by_start = {range_.start: range_ for range_ in samplers[0].sequences}
    streams = []
    for column in columns:
        frames, found = list(column), []
        while frames:
            sequence = by_start[frames[0]]
            assert frames[: len(sequence)] == list(sequence)[: len(frames)]
            frames = frames[len(sequence) :]
            found.append(sequence.start)
        streams.append(found)
    # Entry e of the endless chain of permutations belongs to slot e mod slots.
    complete = min(len(stream) for stream in streams) - 1
    chain = [streams[e % slots][e // slots] for e in range(complete * slots)]
    for turn in range(len(chain) // len(lengths)):
        part = chain[turn * len(lengths) : (turn + 1) * len(lengths)]
        assert sorted(part) == sorted(by_start)


@settings(max_examples=40, deadline=None)
@given(lengths=lengths, batch_size=st.integers(1, 3), start=st.integers(0, 60))
def test_a_restart_goes_on_where_it_was(lengths, batch_size, start) -> None:
    whole = list(islice(make(lengths, batch_size), start + 20))
    assert list(islice(make(lengths, batch_size, start=start), 20)) == whole[start:]


def test_order_depends_on_the_seed_and_changes_from_turn_to_turn() -> None:
    first, second = (list(islice(make([1] * 20, 1, seed=seed), 40)) for seed in (0, 1))
    assert first != second
    assert first[:20] != first[20:]
    assert [batch[0] for batch in islice(make([2] * 3, 1, shuffle=False), 6)] == list(range(6))


def test_length_is_one_pass_over_the_frames() -> None:
    assert len(make([4, 4, 3], 2)) == 5
    assert len(make([1], 2)) == 1


def test_data_without_sequences_is_refused() -> None:
    with pytest.raises(MdpError, match="SimpleNamespace has none"):
        StreamBatchSampler(SimpleNamespace(dataset=SimpleNamespace(), seed=0), 2)
    with pytest.raises(MdpError, match="at least one sequence"):
        make([], 2)


def test_ranks_with_different_data_are_refused(monkeypatch) -> None:
    import torch

    monkeypatch.setattr(module, "all_gather", lambda own: [own, own + torch.tensor([1, 0])])
    with pytest.raises(MdpError, match="rank 0: 3 frames in 1 sequences, rank 1: 4 frames in 1 sequences"):
        make([3], 1)


@settings(max_examples=60, deadline=None)
@given(frames=st.lists(st.integers(1, 9), min_size=1, max_size=5), parts=st.integers(1, 4))
def test_scenes_are_cut_into_equal_parts_and_a_rest(frames, parts) -> None:
    tokens = [f"scene-{i}" for i, n in enumerate(frames) for _ in range(n)]
    sequences = split_sequences(tokens, parts)
    assert [i for sequence in sequences for i in sequence] == list(range(sum(frames)))
    for i, n in enumerate(frames):
        own = [sequence for sequence in sequences if tokens[sequence.start] == f"scene-{i}"]
        assert all(tokens[sequence[-1]] == f"scene-{i}" for sequence in own)
        assert len(own) <= parts
        assert {len(sequence) for sequence in own[:-1]} <= {-(-n // parts)}


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_keeps_scenes_whole_and_deals_every_frame_once(monkeypatch, world_size) -> None:
    dataset = SimpleNamespace(sequences=[range(0, 5), range(5, 6), range(6, 12), range(12, 15)])
    frames = []
    for rank in range(world_size):
        monkeypatch.setattr(module, "get_dist_info", lambda rank=rank: (rank, world_size))
        own = list(SceneSampler(dataset))
        starts = [i for i in own if i - 1 not in own]
        assert set(starts) <= {0, 5, 6, 12}
        assert len(own) == len(SceneSampler(dataset))
        frames += own
    assert sorted(frames) == list(range(15))
    with pytest.raises(MdpError, match="SceneSampler needs a data set with sequences"):
        SceneSampler(SimpleNamespace())
