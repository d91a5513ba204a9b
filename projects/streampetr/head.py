"""The StreamPETR head: image tokens and memory in, boxes and memory out. It holds no state of the stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmdet3d.registry import MODELS
from torch import Tensor, nn

from mdp_mmdet3d.layers.gated import GatedEmbedding

from .conditioning import MLN, FeaturizedPositionEmbedding
from .embeddings import inverse_sigmoid, motion_embedding, point_embedding, sine_embedding
from .memory import (
    MemoryState,
    empty_memory,
    push_detections,
    restart_streams,
    transform_memory,
    truncate_memory,
)
from .position_embedding import CONE_NEAR_BIN, IntrinsicsTiling, depth_bins, frustum_points, token_cone
from .query_gates import gated_mask, gated_output


class HeadOutput(NamedTuple):
    """Raw predictions of one frame.

    Attributes:
        all_cls_scores: (levels, B, n, num_classes) logits; n counts denoising, learned and propagated
            queries, in that order.
        all_bbox_preds: (levels, B, n, 10): centre in metres, log size, sin and cos of yaw, velocity.
        embedding: (B, n, C) post-normed output of the last level.
        reference_points: (B, n, 3) where the queries started, normalised by the point-cloud range.
    """

    all_cls_scores: Tensor
    all_bbox_preds: Tensor
    embedding: Tensor
    reference_points: Tensor


class AlignedQueries(NamedTuple):
    """Queries and remaining memory rows in the current frame; see :meth:`StreamPETRHead.align_queries`."""

    tgt: Tensor
    query_pos: Tensor
    reference_points: Tensor
    temp_memory: Tensor
    temp_pos: Tensor


@MODELS.register_module()
class StreamPETRHead(nn.Module):
    """Query-based 3D detection head with a memory of past queries (arXiv 2303.11926).

    Widths are read from the modules when it runs, so that a pruner may slice them in place. The functions
    that make up a frame take and return tensors only: :meth:`position_embedding`, :meth:`predict`,
    :meth:`remember` and, for one exported graph, :meth:`forward`.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the image features.
        embed_dims: Width of queries and tokens.
        num_query: Learned queries Q.
        num_propagated: Queries P that come from the memory.
        memory_len: Rows L_m of the memory that a frame sees.
        topk_proposals: Rows K that a frame adds to the memory.
        num_branch_names: How many state-dict names the one class branch and the one box branch have.
        stride: Image pixels per token.
        depth_num: Depth bins of the position embedding.
        depth_start: First depth in metres.
        use_lid: Linearly increasing depth spacing.
        position_hidden_dims: Hidden width of the position encoder.
        pc_range: Range of box centres in metres, minimum then maximum corner.
        position_range: Range of the frustum's normalisation in metres.
        code_weights: Weight of each of the ten box-code numbers in loss and matching.
        intrinsics_tiling: See :func:`~.position_embedding.token_cone`; ``camera_minor`` for official weights.
        eps: Bound of the inverse sigmoid; 1e-5 for official weights, 1e-4 for AWML's.
        sine_temperature: Base of the wavelengths that encode points; 1e4 for official weights.
        decoder: Config of the decoder.

    Raises:
        ValueError: The counts or ranges contradict each other.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 256,
        embed_dims: int = 256,
        num_query: int = 300,
        num_propagated: int = 128,
        memory_len: int = 512,
        topk_proposals: int = 128,
        num_branch_names: int = 6,
        stride: int = 16,
        depth_num: int = 64,
        depth_start: float = 1.0,
        use_lid: bool = True,
        position_hidden_dims: int = 1024,
        pc_range: Sequence[float] = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0),
        position_range: Sequence[float] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0),
        code_weights: Sequence[float] = (2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
        intrinsics_tiling: IntrinsicsTiling = "camera_minor",
        eps: float = 1e-5,
        sine_temperature: float = 1e4,
        decoder: dict | None = None,
    ) -> None:
        super().__init__()
        if not num_propagated <= topk_proposals <= num_query + num_propagated:
            raise ValueError(
                f"topk_proposals={topk_proposals} must lie between num_propagated={num_propagated} and "
                f"num_query + num_propagated={num_query + num_propagated}"
            )
        if num_propagated > memory_len:
            raise ValueError(f"num_propagated={num_propagated} exceeds memory_len={memory_len}")
        if depth_num <= CONE_NEAR_BIN:
            raise ValueError(f"depth_num={depth_num}: the cone reads bin {CONE_NEAR_BIN}; use more bins")
        if intrinsics_tiling not in ("camera_minor", "camera_major"):
            raise ValueError(f"intrinsics_tiling={intrinsics_tiling!r}: use 'camera_minor' or 'camera_major'")
        self.memory_len = memory_len
        self.topk_proposals = topk_proposals
        self.stride = stride
        self.intrinsics_tiling = intrinsics_tiling
        self.eps = eps
        self.sine_temperature = sine_temperature

        self.register_buffer("code_weights", torch.tensor(code_weights))
        self.register_buffer("match_costs", torch.tensor(code_weights))
        self.register_buffer("pc_range", torch.tensor(pc_range))
        self.register_buffer("position_range", torch.tensor(position_range))
        self.register_buffer("coords_d", depth_bins(depth_num, depth_start, position_range[3], use_lid))

        d = embed_dims
        self.cls_branches = nn.ModuleList([_class_branch(d, num_classes)] * num_branch_names)
        self.reg_branches = nn.ModuleList([_box_branch(d, len(code_weights))] * num_branch_names)
        self.position_encoder = nn.Sequential(
            nn.Linear(3 * depth_num, position_hidden_dims), nn.ReLU(), nn.Linear(position_hidden_dims, d)
        )
        self.memory_embed = nn.Sequential(nn.Linear(in_channels, d), nn.ReLU(), nn.Linear(d, d))
        self.featurized_pe = FeaturizedPositionEmbedding(d)
        self.reference_points = GatedEmbedding(num_query, 3)
        self.pseudo_reference_points = nn.Embedding(num_propagated, 3)
        nn.init.uniform_(self.reference_points.weight)
        nn.init.uniform_(self.pseudo_reference_points.weight)
        # Trainable pseudo points would keep the first frame's graph alive in the memory.
        self.pseudo_reference_points.weight.requires_grad_(False)
        self.query_embedding = nn.Sequential(nn.Linear(3 * d // 2, d), nn.ReLU(), nn.Linear(d, d))
        self.spatial_alignment = MLN(8, d)
        self.time_embedding = nn.Sequential(nn.Linear(d, d), nn.LayerNorm(d))
        self.ego_pose_pe = MLN(180, d)
        self.ego_pose_memory = MLN(180, d)
        self.transformer = nn.ModuleDict(
            {"decoder": MODELS.build({"type": "StreamPETRDecoder", "embed_dims": d, **(decoder or {})})}
        )

    @property
    def remembers(self) -> bool:
        """Whether a frame says something to the next."""
        return self.memory_len > 0 or self.topk_proposals > 0

    @property
    def num_propagated(self) -> int:
        """Queries that come from the memory."""
        return self.pseudo_reference_points.num_embeddings

    @property
    def embed_dims(self) -> int:
        """Width of the queries."""
        return len(self.transformer["decoder"].post_norm.weight)

    @property
    def kept_channels(self) -> Tensor | None:
        """Which channels of the dense model's queries these are; None: all."""
        return getattr(self.ego_pose_memory.norm, "kept_channels", None)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.cls_branches[0][-1].out_features

    @property
    def pseudo_points(self) -> Tensor:
        """(P, 3) points in metres that seed the memory of a starting stream."""
        return self.to_metres(self.pseudo_reference_points.weight)

    def to_metres(self, points: Tensor) -> Tensor:
        """Points (..., 3) normalised by the point-cloud range, in metres."""
        return points * (self.pc_range[3:] - self.pc_range[:3]) + self.pc_range[:3]

    def normalise(self, points: Tensor) -> Tensor:
        """Points (..., 3) in metres, normalised by the point-cloud range and not clamped."""
        return (points - self.pc_range[:3]) / (self.pc_range[3:] - self.pc_range[:3])

    def empty_memory(self, batch_size: int) -> MemoryState:
        """The memory before the first frame: all zeros."""
        return empty_memory(batch_size, self.memory_len, self.embed_dims, self.pc_range)

    def initial_memory(self, ego_pose: Tensor) -> MemoryState:
        """The float32 memory to feed to :meth:`forward` with the first frame of a stream.

        Args:
            ego_pose: (B, 4, 4) lidar to global frame of that first frame.
        """
        memory = self.empty_memory(ego_pose.shape[0])
        memory = restart_streams(memory, ego_pose.new_zeros(ego_pose.shape[0]), self.pseudo_points)
        return transform_memory(memory, ego_pose)._replace(timestamp=memory.timestamp.float())

    def position_embedding(
        self, pad_hw: Tensor | tuple[int, int], intrinsics: Tensor, img2lidar: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Position embedding and cone of every image token; they depend on the camera rig only.

        Args:
            pad_hw: Height and width in pixels of the padded network image (further entries are ignored).
            intrinsics: (B, N, 4, 4) of the network image.
            img2lidar: (B, N, 4, 4) inverse of lidar2img.

        Returns:
            ``pos_embed`` (B, M, C) before the featurized gate, and ``cone`` (B, M, 8).
        """
        points = frustum_points(pad_hw, self.stride, self.coords_d, img2lidar, self.position_range)
        cone = token_cone(points, intrinsics, self.intrinsics_tiling)
        return self.position_encoder(inverse_sigmoid(points.flatten(2), self.eps)), cone

    def embed_tokens(self, x: Tensor, pos_embed: Tensor, cone: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens and their gated position embedding.

        Args:
            x: (B, N, in_channels, h, w) image features.
            pos_embed: (B, M, C) of :meth:`position_embedding`.
            cone: (B, M, 8) of :meth:`position_embedding`.

        Returns:
            Tokens and position embedding, both (B, M, C), in (camera, row, column) order.
        """
        tokens = self.memory_embed(x.permute(0, 1, 3, 4, 2).flatten(1, 3))
        tokens = self.spatial_alignment(tokens, cone)
        return tokens, self.featurized_pe(pos_embed, tokens)

    def align_queries(self, memory: MemoryState, extra_references: Tensor | None = None) -> AlignedQueries:
        """Temporal alignment: condition queries and memory on motion and time, and propagate the newest rows.

        Args:
            memory: In the current lidar frame, ``memory_len`` rows.
            extra_references: (B, pad, 3) normalised reference points of denoising queries, put first.

        Returns:
            Queries [extra, learned, propagated] and the memory rows behind the propagated ones.
        """
        batch = memory.embedding.shape[0]
        reference = self.reference_points.weight.unsqueeze(0).expand(batch, -1, -1)
        if extra_references is not None:
            reference = torch.cat((extra_references, reference), dim=1)
        query_pos = self._embed_points(reference)
        tgt = torch.zeros_like(query_pos)
        identity = torch.eye(4, dtype=tgt.dtype, device=tgt.device)[:3].reshape(1, 1, 12)
        still = motion_embedding(torch.cat((identity.new_zeros(1, 1, 3), identity), dim=-1))
        tgt = self.ego_pose_memory(tgt, still)
        query_pos = self.ego_pose_pe(query_pos, still) + self._embed_age(torch.zeros_like(identity[..., :1]))
        if not self.remembers:  # exporters divide by the number of rows
            return AlignedQueries(tgt, query_pos, reference, tgt[:, :0], query_pos[:, :0])

        memory_reference = self.normalise(memory.reference_point)
        temp_pos = self._embed_points(memory_reference)
        age = memory.timestamp.to(tgt.dtype)
        moved = motion_embedding(torch.cat((memory.velo, age, memory.egopose[:, :, :3].flatten(2)), dim=-1))
        temp_memory = self.ego_pose_memory(memory.embedding, moved)
        temp_pos = self.ego_pose_pe(temp_pos, moved) + self._embed_age(memory.timestamp)

        p = self.num_propagated
        return AlignedQueries(
            tgt=torch.cat((tgt, temp_memory[:, :p]), dim=1),
            query_pos=torch.cat((query_pos, temp_pos[:, :p]), dim=1),
            reference_points=torch.cat((reference, memory_reference[:, :p]), dim=1),
            temp_memory=temp_memory[:, p:],
            temp_pos=temp_pos[:, p:],
        )

    def _embed_points(self, points: Tensor) -> Tensor:
        num_feats = self.query_embedding[0].in_features // 3
        return self.query_embedding(point_embedding(points, num_feats, self.sine_temperature))

    def _embed_age(self, age: Tensor) -> Tensor:
        linear = self.time_embedding[0]
        sine = sine_embedding(age.squeeze(-1), linear.in_features)
        return self.time_embedding(sine.to(linear.weight.dtype))

    def predict(
        self,
        x: Tensor,
        pos_embed: Tensor,
        cone: Tensor,
        memory: MemoryState,
        *,
        extra_references: Tensor | None = None,
        self_attn_mask: Tensor | None = None,
        last_level_only: bool = False,
    ) -> HeadOutput:
        """Detect the objects of one frame.

        Args:
            x: (B, N, in_channels, h, w) image features.
            pos_embed: (B, M, C) of :meth:`position_embedding`.
            cone: (B, M, 8) of :meth:`position_embedding`.
            memory: In the current lidar frame, ``memory_len`` rows, timestamps as ages in seconds.
            extra_references: (B, pad, 3) normalised reference points of denoising queries.
            self_attn_mask: (pad + Q + P, pad + Q + memory_len) boolean, True where blocked.
            last_level_only: Predict from the last decoder layer only, as at test time.
        """
        tokens, gated_pos_embed = self.embed_tokens(x, pos_embed, cone)
        queries = self.align_queries(memory, extra_references)
        levels = self.transformer["decoder"](
            queries.tgt,
            queries.query_pos,
            queries.temp_memory,
            queries.temp_pos,
            tokens,
            tokens + gated_pos_embed,
            gated_mask(self, queries, self_attn_mask),
        )
        outs = torch.stack(levels[-1:] if last_level_only else levels)
        # One diverged query must not poison the memory; an indexed assignment would export NonZero.
        outs = torch.where(outs.isnan(), torch.zeros_like(outs), outs)
        code = self.reg_branches[0](outs)
        centre = (code[..., :3] + inverse_sigmoid(queries.reference_points, self.eps)).sigmoid()
        boxes = torch.cat((self.to_metres(centre), code[..., 3:]), dim=-1)
        return gated_output(self, HeadOutput(self.cls_branches[0](outs), boxes, outs[-1], queries.reference_points))

    def remember(self, output: HeadOutput, memory: MemoryState) -> MemoryState:
        """Prepend the best queries to ``memory`` (both in the current frame, without denoising queries)."""
        scores = output.all_cls_scores[-1].sigmoid().amax(dim=-1)
        return push_detections(memory, scores, output.embedding, output.all_bbox_preds[-1], self.topk_proposals)

    def forward(
        self,
        x: Tensor,
        pos_embed: Tensor,
        cone: Tensor,
        ego_pose: Tensor,
        ego_pose_inv: Tensor,
        pre_memory: MemoryState,
        last_level_only: bool = False,
    ) -> tuple[Tensor, Tensor, MemoryState]:
        """One frame as a deployed graph: memory in the global frame, the clock is the host's.

        Args:
            x: (B, N, in_channels, h, w) image features.
            pos_embed: (B, M, C).
            cone: (B, M, 8).
            ego_pose: (B, 4, 4) lidar to global frame.
            ego_pose_inv: (B, 4, 4) its inverse.
            pre_memory: At least ``memory_len`` rows; timestamps already are ages in seconds at this frame.
            last_level_only: Predict from the last decoder layer only.

        Returns:
            ``all_cls_scores``, ``all_bbox_preds`` and the memory after the frame (``memory_len +
            topk_proposals`` rows; timestamps are ages at this frame, 0 for the new rows).
        """
        memory = transform_memory(truncate_memory(pre_memory, self.memory_len), ego_pose_inv)
        output = self.predict(x, pos_embed, cone, memory, last_level_only=last_level_only)
        memory = transform_memory(self.remember(output, memory), ego_pose)
        return output.all_cls_scores, output.all_bbox_preds, memory


def _class_branch(embed_dims: int, num_classes: int, prior: float = 0.01) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(embed_dims, embed_dims), nn.LayerNorm(embed_dims), nn.ReLU()]
    logits = nn.Linear(embed_dims, num_classes)
    nn.init.constant_(logits.bias, -math.log((1 - prior) / prior))
    return nn.Sequential(*layers, logits)


def _box_branch(embed_dims: int, code_size: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(embed_dims, embed_dims), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(embed_dims, code_size))
