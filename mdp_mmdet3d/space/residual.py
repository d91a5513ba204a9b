"""Residual networks (mmdet ResNet): removable blocks, and what each convolution is fused with."""

from __future__ import annotations

from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.types import BlockKind

ConvShapes = dict[nn.Module, tuple[int, int, int, int]]


def add_residual_blocks(builder: SpaceBuilder, backbone: nn.Module, path: str) -> None:
    """Add every identity block and every residual branch beside a shortcut convolution as removable."""
    for name, module in backbone.named_modules(prefix=path):
        if isinstance(module, (BasicBlock, Bottleneck)):
            shortcut = module.downsample is not None
            builder.add_block(name, BlockKind.RESIDUAL_BRANCH if shortcut else BlockKind.IDENTITY)


def add_residual_terms(builder: SpaceBuilder, backbone: ResNet, path: str, shapes: ConvShapes, stage: str) -> None:
    """Add the cost of every convolution and of the stem's pooling.

    Args:
        builder: Holds the dimensions already.
        backbone: mmdet ResNet with a plain stem.
        path: Its path in the model.
        shapes: Input shape (B, C, H, W) of every convolution and pooling at deployment size.
        stage: Engine it runs in.

    Raises:
        MdpError: The backbone is a variant with a deep stem.
    """
    if backbone.deep_stem:
        raise MdpError(f"{path}: deep_stem=True is not supported by the residual adapter; freeze the backbone")
    add_conv_term(builder, f"{path}.conv1", backbone.conv1, shapes, stage, relu=True)
    batch, _, height, width = shapes[backbone.maxpool]
    channels = builder.width_of(f"{path}.conv1.weight", 0, backbone.conv1.out_channels)
    pool = backbone.maxpool
    builder.add_term(
        f"{path}.maxpool",
        stage,
        "max_pool",
        (channels,),
        batch=batch,
        height=height,
        width=width,
        kernel=pool.kernel_size,
        stride=pool.stride,
        padding=pool.padding,
    )
    for name, block in backbone.named_modules(prefix=path):
        if not isinstance(block, (BasicBlock, Bottleneck)):
            continue
        last = "conv3" if isinstance(block, Bottleneck) else "conv2"
        for child, module in block.named_children():
            if child.startswith("conv"):
                add_conv_term(builder, f"{name}.{child}", module, shapes, stage, relu=True, residual=child == last)
        if block.downsample is not None:
            conv = next(m for m in block.downsample if isinstance(m, nn.Conv2d))
            add_conv_term(builder, f"{name}.downsample.0", conv, shapes, stage)


def add_conv_term(
    builder: SpaceBuilder,
    name: str,
    conv: nn.Conv2d,
    shapes: ConvShapes,
    stage: str,
    *,
    relu: bool = False,
    residual: bool = False,
    term: str | None = None,
) -> None:
    """Add the cost of one convolution with its folded norm and fused neighbours; ``term`` names a further call."""
    batch, _, height, width = shapes[conv]
    builder.add_term(
        term or name,
        stage,
        "conv",
        (
            builder.width_of(f"{name}.weight", 1, conv.in_channels),
            builder.width_of(f"{name}.weight", 0, conv.out_channels),
        ),
        batch=batch,
        height=height,
        width=width,
        kernel_h=conv.kernel_size[0],
        kernel_w=conv.kernel_size[1],
        stride=conv.stride[0],
        padding=int(conv.padding[0]),
        groups=conv.groups,
        relu=relu,
        residual=residual,
    )
