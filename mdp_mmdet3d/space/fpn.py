"""Feature pyramids: the top-down additions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import nn

from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.conv_terms import FIXED


def add_upsample_terms(
    builder: SpaceBuilder, neck: nn.Module, path: str, shapes: Mapping[str, Sequence[tuple[int, ...]]], engine: str
) -> None:
    """Add the cost of each top-down upsample-and-add.

    Args:
        builder: Holds the dimensions already.
        neck: Has ``lateral_convs``, finest level first.
        path: Its path in the model.
        shapes: Input shapes (B, C, H, W) of the calls of every convolution that ran, by path.
        engine: Engine it runs in.
    """
    laterals = [(f"{path}.lateral_convs.{i}.conv", lateral.conv) for i, lateral in enumerate(neck.lateral_convs)]
    nearest = getattr(neck, "upsample_cfg", {"mode": "nearest"}) == {"mode": "nearest"}
    for (name, conv), (coarser, _) in pairwise(laterals):
        fine, coarse = (shapes.get(path, [None])[0] for path in (name, coarser))
        if fine is None or not nearest or not _is_half(coarse, fine):
            builder.leave(f"{name}.upsample_add", f"is no nearest upsampling by 2; {FIXED}")
            continue
        batch, _, height, width = fine
        channels = builder.width_of(f"{name}.weight", 0, conv.out_channels)
        builder.add_term(
            f"{name}.upsample_add", engine, "upsample_add", (channels,), batch=batch, height=height, width=width
        )


def _is_half(coarse: tuple[int, ...] | None, fine: tuple[int, ...] | None) -> bool:
    """Whether a map has half the height and width of another, rounded up; None is a map that was not recorded."""
    return coarse is not None and fine is not None and coarse[2:] == tuple(-(-size // 2) for size in fine[2:])
