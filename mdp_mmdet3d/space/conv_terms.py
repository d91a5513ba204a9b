"""Cost terms of convolutions, each with the norm, addition and activation that a runtime computes within it."""

from __future__ import annotations

from torch import nn

from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.conv import conv_geometry, conv_obstacle, is_depthwise
from mdp_mmdet3d.space.types import Width, WidthSum

FIXED = "its cost counts as fixed"


def add_conv_term(
    builder: SpaceBuilder,
    name: str,
    conv: nn.Conv2d,
    shape: tuple[int, ...],
    engine: str,
    *,
    relu: bool = False,
    residual: bool = False,
    term: str | None = None,
) -> None:
    """Add the cost of one convolution with its folded norm and fused neighbours, or note why it has none.

    ``shape`` (B, C, H, W) is that of its input, and ``term`` names a further call of it.
    """
    if (obstacle := conv_obstacle(conv)) is not None:
        builder.leave(name, f"{obstacle}; {FIXED}")
        return
    batch, _, height, width = shape
    geometry, kind = conv_geometry(conv).attributes(), "conv"
    widths: tuple[Width, ...] = (
        builder.width_of(f"{name}.weight", 1, conv.in_channels),
        builder.width_of(f"{name}.weight", 0, conv.out_channels),
    )
    if is_depthwise(conv):
        del geometry["groups"]
        kind, widths = "depthwise_conv", widths[1:]
    elif conv.groups > 1 and not isinstance(widths[1], int):  # whole groups go
        channels = conv.out_channels // conv.groups
        kind, widths = "grouped_conv", (_divided(widths[1], channels),)
        geometry |= {"inputs": conv.in_channels // conv.groups, "outputs": channels}
        del geometry["groups"]
    builder.add_term(
        term or name,
        engine,
        kind,
        widths,
        batch=batch,
        height=height,
        width=width,
        relu=relu,
        residual=residual,
        **geometry,  # type: ignore[arg-type]
    )


def _divided(width: Width, divisor: int) -> Width:
    """How many groups a width is, of ``divisor`` channels each; all its parts are whole groups."""
    if isinstance(width, int):
        return width // divisor
    parts, fixed = (width.parts, width.fixed) if isinstance(width, WidthSum) else (((width, 1),), 0)
    groups = WidthSum(tuple((name, times // divisor) for name, times in parts), fixed // divisor)
    alone = len(groups.parts) == 1 and groups.parts[0][1] == 1 and not groups.fixed
    return groups.parts[0][0] if alone else groups
