"""The adapter of detectors that hand to their loss what it needs only while they train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mdp_mmdet3d.adapters.base import register_adapter
from mdp_mmdet3d.adapters.single_graph import SingleGraph


@register_adapter
class TrainingLoss(SingleGraph):
    """Deformable DETR and what derives from it (DINO).

    MMDetection's ``DeformableDETR`` leaves out arguments of its head's loss unless ``training`` is set. It is set on
    the detector alone: its parts stay in evaluation mode, without dropout and with their batch statistics.
    """

    models = ("DeformableDETR",)

    def losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """As `Adapter.losses`."""
        with _training(model):
            return super().losses(model, batch)

    def deployed_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """As `Adapter.deployed_loss`."""
        with _training(model):
            return super().deployed_loss(model, batch)


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    before, model.training = model.training, True
    try:
        yield
    finally:
        model.training = before
