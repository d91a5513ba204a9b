"""Generated images with one marker each, and the share of them that is found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import DATASETS, METRICS
from torch import Tensor
from torch.utils.data import Dataset


@DATASETS.register_module()
class MarkerImages(Dataset):
    """``count`` images (3, size, size), each with the map (size / 4, size / 4) of where its marker is."""

    def __init__(self, count: int = 16, size: int = 64, seed: int = 0) -> None:
        self.count, self.size, self.seed = count, size, seed
        self.metainfo: dict[str, Any] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
        image = torch.randn(3, self.size, self.size, generator=generator)
        cells = self.size // 4
        row, column = (int(i) for i in torch.randint(1, cells - 1, (2,), generator=generator))
        image[:, 4 * row - 2 : 4 * row + 6, 4 * column - 2 : 4 * column + 6] += 3
        where = torch.zeros(cells, cells)
        where[row, column] = 1
        return dict(inputs=image, data_samples=where)


@METRICS.register_module()
class MarkerRecall(BaseMetric):
    """Share of markers whose peak lies within one cell."""

    default_prefix = "markers"

    def process(self, data_batch: dict[str, Any], data_samples: Sequence[Tensor]) -> None:
        """Compare the places found in a batch with its maps."""
        for found, where in zip(data_samples, data_batch["data_samples"]):
            self.results.append(bool(where.nonzero()[0].sub(found.cpu()).abs().max() <= 1))

    def compute_metrics(self, results: list[bool]) -> dict[str, float]:
        """The share."""
        return dict(recall=sum(results) / len(results))
