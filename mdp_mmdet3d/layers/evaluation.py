"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Every module of ``models`` is in evaluation mode, and afterwards each in the mode that it had.

    The modes are set directly: ``train()`` and ``eval()`` of a streaming detector clear its memory, and those of
    mmdet's backbones freeze stages.
    """
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
