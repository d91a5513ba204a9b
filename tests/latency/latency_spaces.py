"""A small pruning space that has every kind of operator."""

from __future__ import annotations

from mdp_mmdet3d.space import Block, BlockKind, CostTerm, Dimension, DimensionKind, OperatorSignature, PruningSpace

CONV = OperatorSignature.make(
    "conv",
    batch=2,
    height=8,
    width=12,
    kernel_h=3,
    kernel_w=3,
    stride=1,
    padding=1,
    groups=1,
    relu=True,
    residual=False,
)
RESIDUAL = OperatorSignature.make(
    "conv", batch=2, height=8, width=12, kernel_h=1, kernel_w=1, stride=1, padding=0, groups=1, relu=True, residual=True
)
STEM = OperatorSignature.make(
    "conv",
    batch=2,
    height=32,
    width=48,
    kernel_h=7,
    kernel_w=7,
    stride=2,
    padding=3,
    groups=1,
    relu=True,
    residual=False,
)
POOL = OperatorSignature.make("max_pool", batch=2, height=16, width=24, kernel=3, stride=2, padding=1)
UPSAMPLE = OperatorSignature.make("upsample_add", batch=2, height=8, width=12)
LINEAR = OperatorSignature.make("linear", tokens=20, norm="layer", activation="relu")
SELF_ATTENTION = OperatorSignature.make("attention", queries=10, keys=16, embed_dims=32, shared=True)
CROSS_ATTENTION = OperatorSignature.make("attention", queries=10, keys=40, embed_dims=32, shared=False)
FFN = OperatorSignature.make("ffn", tokens=10, embed_dims=32)
EVERY_OPERATOR = {
    "conv": (CONV, (32, 48)),
    "residual": (RESIDUAL, (16, 64)),
    "stem": (STEM, (3, 32)),
    "pool": (POOL, (48,)),
    "upsample": (UPSAMPLE, (32,)),
    "linear": (LINEAR, (32, 48)),
    "self": (SELF_ATTENTION, (3, 8, 4)),
    "cross": (CROSS_ATTENTION, (2, 4, 8)),
    "ffn": (FFN, (64,)),
}


def dimension(name: str, options: tuple[int, ...], kind: DimensionKind = DimensionKind.CHANNELS) -> Dimension:
    return Dimension(name, kind, options[-1], options, (), ())


def small_space() -> PruningSpace:
    channels = (16, 32, 48, 64, 80, 96, 112, 128)
    return PruningSpace(
        model="Small",
        model_digest="f",
        dimensions=(
            dimension("stem", (16, 32, 48, 64)),
            dimension("stage", channels),
            dimension("inner", channels),
            dimension("heads", (1, 2, 3, 4), DimensionKind.HEADS),
            dimension("qk", (8, 16, 24, 32), DimensionKind.QK_WIDTH),
            dimension("v", (8, 16, 24, 32), DimensionKind.V_WIDTH),
            dimension("hidden", channels, DimensionKind.HIDDEN),
            dimension("rig", channels, DimensionKind.HIDDEN),
        ),
        blocks=(
            Block("block", BlockKind.IDENTITY),
            Block("layer", BlockKind.LAYER),
            Block("layer.attention", BlockKind.SUB_LAYER, "layer"),
            Block("layer.ffn", BlockKind.SUB_LAYER, "layer"),
        ),
        terms=(
            CostTerm("net.stem", STEM, (3, "stem"), None, "image_encoder"),
            CostTerm("net.pool", POOL, ("stem",), None, "image_encoder"),
            CostTerm("net.block.conv1", CONV, ("stage", "inner"), "block", "image_encoder"),
            CostTerm("net.block.conv2", CONV, ("inner", "inner"), "block", "image_encoder"),
            CostTerm("net.block.conv3", RESIDUAL, ("inner", "stage"), "block", "image_encoder"),
            CostTerm("net.out", CONV, ("stage", 64), None, "image_encoder"),
            CostTerm("head.layer.attention", SELF_ATTENTION, ("heads", "qk", "v"), "layer.attention", "head"),
            CostTerm("head.layer.ffn", FFN, ("hidden",), "layer.ffn", "head"),
            CostTerm("head.out", LINEAR, (32, "hidden"), None, "head"),
            CostTerm("rig.linear", LINEAR, (32, "rig"), None, "position_embedding"),
        ),
    )
