"""What may be pruned in StreamPETR: tells the adapters where backbone, neck, decoder and embeddings are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mmdet.models.backbones.resnet import ResNet
from torch import Tensor, nn

from mdp_mmdet3d.adapters.call_terms import add_call_terms
from mdp_mmdet3d.space.attention import add_attention
from mdp_mmdet3d.space.builder import InputShape, SpaceBuilder
from mdp_mmdet3d.space.conv import add_conv_dimensions, record_conv_inputs
from mdp_mmdet3d.space.fpn import add_fpn_terms
from mdp_mmdet3d.space.mlp import add_fan_out, add_hidden, add_mlp
from mdp_mmdet3d.space.residual import ConvShapes, add_conv_term, add_residual_blocks, add_residual_terms
from mdp_mmdet3d.space.types import BlockKind, TensorAxis, Width
from projects.streampetr.head_terms import add_global_calls
from projects.streampetr.query_count import add_query_count
from projects.streampetr.query_width import add_query_width
from projects.streampetr.vovnet import OneShotAggregation, VoVNet

HEAD = "pts_bbox_head"


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
    """Fill ``builder`` with the dimensions, blocks and terms of a dense StreamPETR."""
    features = _add_encoder(builder, model, shape)
    head = model.pts_bbox_head
    tokens = shape.num_cams * (shape.height // head.stride) * (shape.width // head.stride)
    _add_embeddings(builder, head, tokens, features)
    _add_decoder(builder, head, tokens)
    _note_fixed(builder)
    before = set(builder.dimensions)
    if builder.options.embed_width:
        add_query_width(builder, model)
    if builder.options.queries:
        add_query_count(builder, model)
    add_global_calls(builder, model, shape, builder.dimensions.keys() - before)


def _add_encoder(builder: SpaceBuilder, model: nn.Module, shape: InputShape) -> Width:
    encoder = ImageEncoder(model.img_backbone, model.img_neck)
    backbone = model.img_backbone
    if isinstance(backbone, ResNet):
        add_residual_blocks(builder, backbone, "img_backbone")
    elif isinstance(backbone, VoVNet):
        _add_aggregation_blocks(builder, backbone, "img_backbone")
    else:
        builder.leave("img_backbone", f"no adapter for {type(backbone).__name__}")
        return int(model.img_neck.fpn_convs[0].conv.out_channels)
    add_conv_dimensions(builder, encoder)
    device = next(model.parameters()).device
    images = shape.num_cams // shape.encoder_runs
    shapes = record_conv_inputs(encoder, torch.zeros(images, 3, shape.height, shape.width, device=device))
    if isinstance(backbone, ResNet):
        add_residual_terms(builder, backbone, "img_backbone", shapes, "image_encoder")
    else:
        _add_aggregation_terms(builder, backbone, "img_backbone", shapes, "image_encoder")
    add_fpn_terms(builder, model.img_neck, "img_neck", shapes, "image_encoder")
    if isinstance(backbone, VoVNet):  # gates, poolings that round up, concatenations
        sizes = ((64, 64), (shape.height, shape.width))
        small, deployed = (_encoding(torch.zeros(images, 3, *size, device=device)) for size in sizes)
        add_call_terms(builder, model, lambda whole: whole, small, deployed, "image_encoder")
    output = builder.width_of("img_neck.fpn_convs.0.conv.weight", 0, model.img_neck.fpn_convs[0].conv.out_channels)
    builder.extend(output, [TensorAxis(f"{HEAD}.memory_embed.0.weight", 1)])
    # The auxiliary head reads the same feature map in training.
    if getattr(model, "img_roi_head", None) is not None:
        builder.extend(
            output, [TensorAxis(f"img_roi_head.{tower}.0.weight", 1) for tower in ("shared_cls", "shared_reg")]
        )
    return output


def _encoding(images: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model.img_neck(model.img_backbone(images))[0]


def _add_aggregation_blocks(builder: SpaceBuilder, backbone: VoVNet, path: str) -> None:
    """One-shot aggregations that are added to their input can go."""
    for name, module in backbone.named_modules(prefix=path):
        if isinstance(module, OneShotAggregation) and module.identity:
            last = next(n for n, m in module.concat.named_children() if isinstance(m, nn.BatchNorm2d))
            builder.add_block(name, BlockKind.IDENTITY, last=f"concat.{last}")


def _add_aggregation_terms(builder: SpaceBuilder, backbone: VoVNet, path: str, shapes: ConvShapes, engine: str) -> None:
    """The cost of every convolution, by the sum of what it reads."""
    for name, module in backbone.named_modules(prefix=path):
        if isinstance(module, nn.Conv2d):
            owner = builder.model.get_submodule(name.rpartition(".")[0])
            relu = isinstance(owner, nn.Sequential)  # of convolution, norm and ReLU; a gate's convolution has none
            add_conv_term(builder, name, module, shapes, engine, relu=relu)


def _add_embeddings(builder: SpaceBuilder, head: nn.Module, tokens: int, features: Width) -> None:
    memory = head.memory_len
    queries = head.reference_points.num_embeddings + head.num_propagated
    add_mlp(builder, head.position_encoder, f"{HEAD}.position_encoder", tokens=tokens, engine="position_embedding")
    add_mlp(builder, head.memory_embed, f"{HEAD}.memory_embed", tokens=tokens, engine="head", input_width=features)
    add_fan_out(
        builder,
        f"{HEAD}.spatial_alignment.reduce.0",
        tuple(f"{HEAD}.spatial_alignment.{leaf}" for leaf in ("gamma", "beta")),
        tokens=tokens,
        engine="head",
    )
    add_fan_out(
        builder,
        f"{HEAD}.featurized_pe.conv_reduce",
        (f"{HEAD}.featurized_pe.conv_expand",),
        tokens=tokens,
        engine="head",
    )
    # The learned queries' part is constant and folded at export; the memory rows' part runs every frame.
    if memory:
        add_mlp(builder, head.query_embedding, f"{HEAD}.query_embedding", tokens=memory, engine="head")
    else:
        builder.leave(f"{HEAD}.query_embedding", "without a memory it is constant and costs nothing")
    for name in ("ego_pose_pe", "ego_pose_memory"):
        if not memory:
            builder.leave(f"{HEAD}.{name}", "without a memory it is constant and costs nothing")
            continue
        add_fan_out(
            builder,
            f"{HEAD}.{name}.reduce.0",
            tuple(f"{HEAD}.{name}.{leaf}" for leaf in ("gamma", "beta")),
            tokens=memory,
            engine="head",
        )
    for name in ("cls_branches", "reg_branches"):
        add_mlp(builder, getattr(head, name)[0], f"{HEAD}.{name}.0", tokens=queries, engine="head")


def _add_decoder(builder: SpaceBuilder, head: nn.Module, tokens: int) -> None:
    queries = head.reference_points.num_embeddings + head.num_propagated
    keys = head.reference_points.num_embeddings + head.memory_len  # self-attention: queries and remaining memory
    for i, layer in enumerate(head.transformer["decoder"].layers):
        path = f"{HEAD}.transformer.decoder.layers.{i}"
        # Queries must see the image somewhere: the first layer and its cross-attention stay.
        parent = None
        if i > 0:
            builder.add_block(path, BlockKind.LAYER)
            parent = path
        else:
            builder.leave(path, "one decoder layer has to stay")
            builder.leave(f"{path}.attentions.1", "queries have to see the image")
        for j, key_tokens in ((0, keys), (1, tokens)):
            sub_layer = f"{path}.attentions.{j}"
            if (i, j) != (0, 1):
                builder.add_block(sub_layer, BlockKind.SUB_LAYER, parent, last="attn.out_proj")
            attention = layer.attentions[j].attn
            widths = add_attention(
                builder, f"{sub_layer}.attn", attention.num_heads, attention.qk_head_dim, attention.v_head_dim
            )
            builder.add_term(
                sub_layer,
                "head",
                "attention",
                widths,
                queries=queries,
                keys=key_tokens,
                embed_dims=head.embed_dims,
                shared=j == 0,
            )
        ffn = f"{path}.ffns.0"
        builder.add_block(ffn, BlockKind.SUB_LAYER, parent, last="layers.1")
        hidden = add_hidden(builder, f"{ffn}.layers.0.0", (f"{ffn}.layers.1",), layer.ffns[0].layers[0][0].out_features)
        builder.add_term(ffn, "head", "ffn", (hidden,), tokens=queries, embed_dims=head.embed_dims)


def _note_fixed(builder: SpaceBuilder) -> None:
    for module, reason in (
        ("embed_dims", "query and token width: engine inputs and every norm depend on it; see prune.embed_width"),
        ("transformer.decoder.layers.*.norms", "post-norm: the norm stays when its sub-layer goes"),
        ("transformer.decoder.post_norm", "output norm of every level"),
        ("time_embedding", "one linear layer on the query width"),
        ("reference_points", "number of learned queries: the heads run on that many rows; see prune.queries"),
        ("pseudo_reference_points", "frozen constants of the memory"),
        ("memory", "queue length is an engine input"),
    ):
        builder.leave(f"{HEAD}.{module}", reason)
