"""A data set of recorded frames, by name, so that configs and child processes can use it."""

from __future__ import annotations

import pickle
from pathlib import Path

from mmdet3d.registry import DATASETS
from torch.utils.data import Dataset


@DATASETS.register_module()
class RecordedFrames(Dataset):
    """Single frames, each a stream of its own, from a pickled list of items.

    Args:
        path: The file.
        corrupt: Item whose image holds a NaN.
    """

    def __init__(self, path: str, corrupt: int | None = None) -> None:
        self.metainfo = dict(classes=tuple("abcdefghij"))
        self.content = Path(path).read_bytes()
        self.corrupt = corrupt
        self.length = len(pickle.loads(self.content))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        item = pickle.loads(self.content)[i]
        item["data_samples"].set_metainfo(dict(prev_exists=False))
        if i == self.corrupt:
            item["inputs"]["img"][0, 0, 0, 0] = float("nan")
        return item
