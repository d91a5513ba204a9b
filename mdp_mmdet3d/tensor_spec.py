"""A tensor as the outside of a graph or an engine sees it; below `trt` and `runtime`, which both speak of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype name and static shape of a graph input or output."""

    name: str
    dtype: str
    shape: tuple[int, ...]
