"""Streaming batches: every column of a batch, on every rank, follows a sequence of its own from start to end."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from itertools import count
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather, get_dist_info
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

from mdp_mmdet3d.errors import MdpError


@DATA_SAMPLERS.register_module()
class StreamBatchSampler(Sampler):
    """Endless batches for a detector with a memory per batch column (StreamPETR's streaming training).

    There are ``ranks * batch_size`` slots. Slot s takes the sequences number s, s + slots, s + 2 slots, ... of an
    endless chain of random permutations that is the same on all ranks, and reads each from its first frame to its last.
    Set it as ``batch_sampler`` of a dataloader; of ``sampler`` only the data set and the seed are used::

        dict(batch_size=2, sampler=dict(type="DefaultSampler"), batch_sampler=dict(type="StreamBatchSampler"), ...)

    Args:
        sampler: What MMEngine built from the loader's ``sampler``: has ``dataset`` and ``seed``, which all ranks share.
        batch_size: Columns of a batch.
        drop_last: Accepted because MMEngine passes it; batches are always complete.
        shuffle: Off, the sequences come in the order of the data set.
        start: Batches to leave out at the beginning; a resumed training sets it instead of loading them.

    Raises:
        MdpError: The data set has no ``sequences``, or not the same ones on all ranks.
    """

    def __init__(
        self, sampler: Any, batch_size: int, drop_last: bool = True, shuffle: bool = True, start: int = 0
    ) -> None:
        dataset = sampler.dataset
        if not hasattr(dataset, "sequences"):
            raise MdpError(
                f"StreamBatchSampler needs a data set with sequences, {type(dataset).__name__} has none; use "
                "StreamNuScenesDataset, or another batch_sampler"
            )
        self.sampler = sampler
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.start = start
        self.sequences = [sequence for sequence in dataset.sequences if len(sequence)]
        self.rank, self.world_size = get_dist_info()
        self._num_frames = sum(len(sequence) for sequence in self.sequences)
        self._check_ranks(dataset)

    def _check_ranks(self, dataset: Sized) -> None:
        sizes = [tuple(size.tolist()) for size in all_gather(torch.tensor([self._num_frames, len(self.sequences)]))]
        if not self.sequences or len(set(sizes)) > 1:
            found = ", ".join(f"rank {rank}: {n} frames in {s} sequences" for rank, (n, s) in enumerate(sizes))
            raise MdpError(
                f"every rank must read the same data, at least one sequence, but found {found}; check that "
                f"{getattr(dataset, 'ann_file', 'the info file')} is the same file on all machines"
            )

    def __iter__(self) -> Iterator[list[int]]:
        first = self.rank * self.batch_size
        slots = [self._frames(first + column) for column in range(self.batch_size)]
        yield from map(list, zip(*slots))

    def _frames(self, slot: int) -> Iterator[int]:
        """Frames of one slot, without the first ``start``."""
        skip = self.start
        for sequence in self._sequences(slot):
            yield from sequence[skip:]
            skip = max(0, skip - len(sequence))

    def _sequences(self, slot: int) -> Iterator[range]:
        slots = self.world_size * self.batch_size
        for turn in count():
            order = np.arange(len(self.sequences))
            if self.shuffle:
                order = np.random.default_rng([self.sampler.seed, turn]).permutation(order)
            yield from (self.sequences[i] for i in order[(slot - turn * len(order)) % slots :: slots])

    def __len__(self) -> int:
        """Batches in which the slots together see as many frames as the data set has."""
        return max(1, self._num_frames // (self.world_size * self.batch_size))


@DATA_SAMPLERS.register_module()
class SceneSampler(Sampler):
    """Frames in stream order for evaluation; with several ranks every scene stays whole on one of them.

    MMEngine's ``DefaultSampler`` deals single frames to the ranks, which would tear every stream.

    Args:
        dataset: Has ``sequences``.
        seed: Accepted because MMEngine passes it.

    Raises:
        MdpError: The data set has no ``sequences``.
    """

    def __init__(self, dataset: Any, seed: int | None = None) -> None:
        if not hasattr(dataset, "sequences"):
            raise MdpError(
                f"SceneSampler needs a data set with sequences, {type(dataset).__name__} has none; use "
                "StreamNuScenesDataset, or another sampler"
            )
        rank, world_size = get_dist_info()
        loads = [0] * world_size
        self.frames: list[int] = []
        for sequence in dataset.sequences:
            owner = loads.index(min(loads))
            loads[owner] += len(sequence)
            if owner == rank:
                self.frames += sequence

    def __iter__(self) -> Iterator[int]:
        return iter(self.frames)

    def __len__(self) -> int:
        return len(self.frames)
