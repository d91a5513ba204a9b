"""Residual networks (mmdet ResNet): removable blocks, and what each convolution is fused with."""

from __future__ import annotations

from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from mmdet.models.backbones.resnext import Bottleneck as GroupedBottleneck
from torch import nn

from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.conv import Norm, conv_geometry, conv_obstacle, is_depthwise, norm_obstacle
from mdp_mmdet3d.space.types import BlockKind, Width, WidthSum

ConvShapes = dict[nn.Module, tuple[int, int, int, int]]
BLOCKS = (BasicBlock, Bottleneck)
KNOWN_BLOCKS = (BasicBlock, Bottleneck, GroupedBottleneck)  # subclasses run in other ways
FIXED = "its cost counts as fixed"


def add_residual_blocks(builder: SpaceBuilder, backbone: nn.Module, path: str) -> None:
    """Add every identity block and every residual branch beside a shortcut convolution as removable.

    A block with an operator that has no cost (deformable convolution, group norm, plugin) is left alone; channels that
    touch the inside of one whose forward is not known are left alone, too.
    """
    for name, module in backbone.named_modules(prefix=path):
        if not isinstance(module, BLOCKS):
            continue
        if type(module) not in KNOWN_BLOCKS:
            builder.exclude(name, f"no adapter knows how {type(module).__module__}.{type(module).__name__} runs")
        elif getattr(module, "with_plugins", False):
            builder.exclude(name, "its plugins have no cost term")
        elif (obstacle := _block_obstacle(module)) is not None:
            builder.leave(name, obstacle)
        else:
            builder.add_block(
                name,
                BlockKind.IDENTITY if module.downsample is None else BlockKind.RESIDUAL_BRANCH,
                last=module.norm3_name if isinstance(module, Bottleneck) else module.norm2_name,
                stays=("downsample", "relu"),
            )


def _block_obstacle(block: nn.Module) -> str | None:
    """Why a block's latency is not the sum of its terms, or None; its shortcut stays and does not matter."""
    for name, module in block.named_modules():
        own = next(module.parameters(recurse=False), None)
        if name.startswith("downsample") or (own is None and not isinstance(module, Norm)):
            continue
        reason = conv_obstacle(module) if isinstance(module, nn.Conv2d) else norm_obstacle(module)
        if reason is not None:
            return f"not removable: {name} {reason}"
    return None


def add_residual_terms(builder: SpaceBuilder, backbone: ResNet, path: str, shapes: ConvShapes, engine: str) -> None:
    """Add the cost of every convolution and of the stem's pooling; what has no cost term is noted as left alone.

    Args:
        builder: Holds the dimensions already.
        backbone: mmdet ResNet.
        path: Its path in the model.
        shapes: Input shape (B, C, H, W) of every convolution and pooling at deployment size.
        engine: Engine it runs in.
    """
    stem = (
        [(n, m) for n, m in backbone.stem.named_modules(prefix=f"{path}.stem") if hasattr(m, "kernel_size")]
        if backbone.deep_stem
        else [(f"{path}.conv1", backbone.conv1)]
    )
    for name, conv in stem:
        add_conv_term(builder, name, conv, shapes, engine, relu=True)
    _add_pool_term(builder, backbone.maxpool, f"{path}.maxpool", stem[-1], shapes, engine)
    for name, block in backbone.named_modules(prefix=path):
        if not isinstance(block, BLOCKS) or builder.excluded(name) is not None:
            continue
        last = "conv3" if isinstance(block, Bottleneck) else "conv2"
        for child, module in block.named_children():
            if child.startswith("conv"):
                add_conv_term(builder, f"{name}.{child}", module, shapes, engine, relu=True, residual=child == last)
        for child, module in block.downsample.named_children() if block.downsample is not None else ():
            if hasattr(module, "out_channels"):
                add_conv_term(builder, f"{name}.downsample.{child}", module, shapes, engine)
            elif not isinstance(module, nn.modules.batchnorm._BatchNorm):
                builder.leave(f"{name}.downsample.{child}", f"is a {type(module).__name__}; {FIXED}")


def _add_pool_term(
    builder: SpaceBuilder,
    pool: nn.Module,
    name: str,
    source: tuple[str, nn.Module],
    shapes: ConvShapes,
    engine: str,
) -> None:
    """Add the cost of the max-pooling behind the convolution ``source``."""
    sizes = [getattr(pool, size, None) for size in ("kernel_size", "stride", "padding")]
    if type(pool) is not nn.MaxPool2d or pool not in shapes:
        builder.leave(name, f"is a {type(pool).__name__} or does not run once per frame; {FIXED}")
        return
    if not all(isinstance(size, int) for size in sizes) or pool.dilation != 1 or pool.ceil_mode:
        builder.leave(name, f"pools with unequal sides, dilation or ceil_mode; {FIXED}")
        return
    batch, channels, height, width = shapes[pool]
    builder.add_term(
        name,
        engine,
        "max_pool",
        (builder.width_of(f"{source[0]}.weight", 0, channels),),
        batch=batch,
        height=height,
        width=width,
        kernel=pool.kernel_size,
        stride=pool.stride,
        padding=pool.padding,
    )


def add_conv_term(
    builder: SpaceBuilder,
    name: str,
    conv: nn.Conv2d,
    shapes: ConvShapes,
    engine: str,
    *,
    relu: bool = False,
    residual: bool = False,
    term: str | None = None,
) -> None:
    """Add the cost of one convolution with its folded norm and fused neighbours, or note why it has none.

    ``term`` names a further call of it.
    """
    obstacle = conv_obstacle(conv)
    if obstacle is None and conv not in shapes:
        obstacle = "does not run exactly once per frame"
    if obstacle is not None:
        builder.leave(name, f"{obstacle}; {FIXED}")
        return
    batch, _, height, width = shapes[conv]
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
