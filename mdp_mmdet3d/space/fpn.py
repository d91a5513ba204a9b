"""Feature pyramids: lateral and output convolutions, and the top-down additions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.residual import ConvShapes, add_conv_term


def add_fpn_terms(builder: SpaceBuilder, neck: nn.Module, path: str, shapes: ConvShapes, stage: str) -> None:
    """Add the cost of every convolution that ran and of each upsample-and-add.

    Args:
        builder: Holds the dimensions already.
        neck: Has ``lateral_convs`` and ``fpn_convs``, finest level first.
        path: Its path in the model.
        shapes: Input shape (B, C, H, W) of every convolution that ran.
        stage: Engine it runs in.
    """
    for name, module in neck.named_modules(prefix=path):
        if isinstance(module, nn.Conv2d) and module in shapes:
            add_conv_term(builder, name, module, shapes, stage)
    add_upsample_terms(
        builder, neck, path, {name: [shapes[m]] for name, m in neck.named_modules(prefix=path) if m in shapes}, stage
    )


def add_upsample_terms(
    builder: SpaceBuilder, neck: nn.Module, path: str, shapes: Mapping[str, Sequence[tuple[int, ...]]], stage: str
) -> None:
    """Add the cost of each top-down upsample-and-add.

    Args:
        builder: Holds the dimensions already.
        neck: Has ``lateral_convs``, finest level first.
        path: Its path in the model.
        shapes: Input shapes (B, C, H, W) of the calls of every convolution that ran, by path.
        stage: Engine it runs in.
    """
    laterals = [(f"{path}.lateral_convs.{i}.conv", lateral.conv) for i, lateral in enumerate(neck.lateral_convs)]
    for name, conv in laterals[:-1]:
        batch, _, height, width = shapes[name][0]
        channels = builder.width_of(f"{name}.weight", 0, conv.out_channels)
        builder.add_term(
            f"{name}.upsample_add", stage, "upsample_add", (channels,), batch=batch, height=height, width=width
        )
