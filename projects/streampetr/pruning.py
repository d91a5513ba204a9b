"""What may be pruned in StreamPETR: where backbone, neck, decoder and embeddings are, and what has to stay."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from mmdet.models.backbones.resnet import ResNet
from torch import Tensor, nn

from mdp_mmdet3d.adapters.attentions import find_attentions
from mdp_mmdet3d.adapters.call_terms import add_call_terms
from mdp_mmdet3d.adapters.cut_models import CutModels
from mdp_mmdet3d.adapters.deployed_graph import DeployedGraph, Run
from mdp_mmdet3d.adapters.graph_terms import add_graph_terms
from mdp_mmdet3d.adapters.network import add_network_terms
from mdp_mmdet3d.adapters.residual_blocks import ResidualBlock, add_residual_branches
from mdp_mmdet3d.adapters.transformer_layers import add_transformer_layers
from mdp_mmdet3d.space.builder import InputShape, SpaceBuilder
from mdp_mmdet3d.space.calls import Call
from mdp_mmdet3d.space.conv import add_conv_dimensions
from mdp_mmdet3d.space.mlp import add_hidden, add_mlp
from mdp_mmdet3d.space.types import BlockKind, DimensionKind, TensorAxis
from projects.streampetr.head_runs import HEAD, LAYERS, SMALL, HeadRuns
from projects.streampetr.query_count import add_query_count, open_queries
from projects.streampetr.vovnet import OneShotAggregation, VoVNet

SMALL_IMAGE = (64, 64)
CONSTANT = "without a memory it is constant and costs nothing"


class ImageEncoder(nn.Module):
    """Backbone and neck; returns the one feature map that the head reads."""

    def __init__(self, backbone: nn.Module, neck: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck

    def forward(self, images: Tensor) -> Tensor:
        """(B * N, 3, H, W) to (B * N, C, H / 16, W / 16)."""
        return self.neck(self.backbone(images))[0]


def add_streampetr(builder: SpaceBuilder, model: nn.Module, shape: InputShape) -> None:
    """Fill ``builder`` with the dimensions, blocks and terms of a dense StreamPETR.

    Which rows, tokens and pixels an operator works on, and what it is fused with, is seen by running the three graphs.
    """
    head = model.get_submodule(HEAD)
    encoder = _image_encoder(model, shape)
    encoder_calls = encoder.calls(model)
    blocks = _add_encoder(builder, model, encoder_calls)
    _add_embeddings(builder, head)
    _add_layers(builder, head)
    small, deployed = (
        HeadRuns(model, maps)
        for maps in (SMALL, (shape.num_cams, shape.height // head.stride, shape.width // head.stride))
    )
    position = DeployedGraph("position_embedding", small.position_embedding, deployed.position_embedding)
    detector = DeployedGraph("head", small.head, deployed.head)
    calls, sizes = detector.calls(model), detector.at_size(model)
    attentions = find_attentions(builder, model, partial(small.head, model), sizes.shapes)
    wanted = partial(small.frame, model) if builder.options.embed_width else None
    add_transformer_layers(builder, calls, attentions, sizes.shapes, detector.engine, wanted)
    _note_fixed(builder)
    queries = add_query_count(builder, model) if builder.options.queries else None
    cut = CutModels.of(builder, model)
    add_graph_terms(builder, model, encoder, encoder_calls, encoder.at_size(model), blocks, cut_models=cut)
    add_graph_terms(builder, model, position, position.calls(model), position.at_size(model), cut_models=cut)
    recorded = detector.operations(model)
    add_network_terms(builder, calls, sizes.shapes, (), detector.engine, recorded[0], priced=[LAYERS])
    if queries is not None:
        open_queries(builder, model, queries, small)
    add_call_terms(builder, model, detector, recorded, sizes.operations, [LAYERS], cut)


def _image_encoder(model: nn.Module, shape: InputShape) -> DeployedGraph:
    generator = torch.Generator().manual_seed(0)

    def runs(images: int, *size: int) -> Run:
        noise = torch.randn(images, 3, *size, generator=generator).to(next(model.parameters()))
        return lambda model: model.img_neck(model.img_backbone(noise))[0]

    deployed = runs(shape.num_cams // shape.encoder_runs, shape.height, shape.width)
    return DeployedGraph("image_encoder", runs(1, *SMALL_IMAGE), deployed)


def _add_encoder(builder: SpaceBuilder, model: nn.Module, calls: Sequence[Call]) -> list[ResidualBlock]:
    """Blocks and channels; returns the blocks that end in a convolution."""
    backbone, convs = model.img_backbone, model.img_neck.fpn_convs
    if not isinstance(backbone, (ResNet, VoVNet)):
        builder.leave("img_backbone", f"no adapter for {type(backbone).__name__}")
        return []
    blocks = add_residual_branches(builder, calls)
    if isinstance(backbone, VoVNet):
        _add_aggregation_blocks(builder, backbone, "img_backbone")
    add_conv_dimensions(builder, ImageEncoder(backbone, model.img_neck))
    output = builder.width_of("img_neck.fpn_convs.0.conv.weight", 0, convs[0].conv.out_channels)
    builder.extend(output, [TensorAxis(f"{HEAD}.memory_embed.0.weight", 1)])
    # The auxiliary head reads the same feature map in training.
    if getattr(model, "img_roi_head", None) is not None:
        builder.extend(
            output, [TensorAxis(f"img_roi_head.{tower}.0.weight", 1) for tower in ("shared_cls", "shared_reg")]
        )
    return blocks


def _add_aggregation_blocks(builder: SpaceBuilder, backbone: VoVNet, path: str) -> None:
    """One-shot aggregations that are added to their input can go."""
    for name, module in backbone.named_modules(prefix=path):
        if isinstance(module, OneShotAggregation) and module.identity:
            last = next(n for n, m in module.concat.named_children() if isinstance(m, nn.BatchNorm2d))
            builder.add_block(name, BlockKind.IDENTITY, last=f"concat.{last}")


def _add_embeddings(builder: SpaceBuilder, head: nn.Module) -> None:
    """Hidden widths of everything around the decoder."""
    for name in ("position_encoder", "memory_embed", "query_embedding", "cls_branches.0", "reg_branches.0"):
        if name == "query_embedding" and not head.memory_len:
            builder.leave(f"{HEAD}.{name}.0.out", CONSTANT)
            continue
        add_mlp(builder, head.get_submodule(name), f"{HEAD}.{name}")
    for name in ("spatial_alignment", "ego_pose_pe", "ego_pose_memory"):
        first = f"{HEAD}.{name}.reduce.0"
        if name != "spatial_alignment" and not head.memory_len:
            builder.leave(f"{first}.out", CONSTANT)
            continue
        readers = tuple(f"{HEAD}.{name}.{leaf}" for leaf in ("gamma", "beta"))
        add_hidden(builder, first, readers, builder.model.get_submodule(first).out_features)
    gate = head.featurized_pe.conv_reduce
    add_hidden(
        builder,
        f"{HEAD}.featurized_pe.conv_reduce",
        (f"{HEAD}.featurized_pe.conv_expand",),
        gate.out_features,
    )


def _add_layers(builder: SpaceBuilder, head: nn.Module) -> None:
    """Decoder layers can go but for the first, and queries must see the image somewhere."""
    for i in range(len(head.transformer["decoder"].layers)):
        if i:
            builder.add_block(f"{LAYERS}.{i}", BlockKind.LAYER)
    builder.leave(f"{LAYERS}.0", "one decoder layer has to stay")
    builder.leave(f"{LAYERS}.0.attentions.1", "queries have to see the image")


def _note_fixed(builder: SpaceBuilder) -> None:
    wide = any(dimension.kind is DimensionKind.EMBED_WIDTH for dimension in builder.dimensions.values())
    for module, reason in (
        ("embed_dims", "query and token width: engine inputs and every norm depend on it; see prune.embed_width"),
        ("transformer.decoder.layers.*.norms", "post-norm: the norm stays when its sub-layer goes"),
        ("transformer.decoder.post_norm", "output norm of every level"),
        ("time_embedding", "one linear layer on the query width"),
        ("reference_points", "number of learned queries: the heads run on that many rows; see prune.queries"),
        ("pseudo_reference_points", "frozen constants of the memory"),
        ("memory", "queue length is an engine input"),
    ):
        if not wide or module not in ("embed_dims", "time_embedding"):
            builder.leave(f"{HEAD}.{module}", reason)
