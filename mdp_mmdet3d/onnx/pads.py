"""Paddings as numbers in a graph: onnxslim 0.1 rounds some of what PyTorch's exporter computes them from otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def constant_pads() -> Iterator[None]:
    """Let `torch.nn.functional.pad` take numbers while a module is traced, whose sizes are traced otherwise."""
    pad = torch.nn.functional.pad

    def numbered(x: Tensor, widths: Sequence[Any], *args: Any, **kwargs: Any) -> Tensor:
        return pad(x, [int(width) for width in widths], *args, **kwargs)

    torch.nn.functional.pad = numbered
    try:
        yield
    finally:
        torch.nn.functional.pad = pad
