"""Denoising queries: noised ground-truth centres that need no matching (training only)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmdet3d.registry import TASK_UTILS
from torch import Tensor


class DenoisingQueries(NamedTuple):
    """Denoising queries of a batch; T = groups * number of ground-truth boxes.

    Attributes:
        reference_points: (B, pad, 3) normalised centres; unused slots are zero.
        self_attn_mask: (pad + num_queries, pad + num_keys) boolean, True where attention is blocked.
        labels: (T,) class, or num_classes for a sample with too much noise.
        boxes: (T, 9) true boxes.
        sample_index: (T,) position in the batch.
        slot_index: (T,) position among the pad slots.
        expected_positives: Expected number of slots that keep their class.
    """

    reference_points: Tensor
    self_attn_mask: Tensor
    labels: Tensor
    boxes: Tensor
    sample_index: Tensor
    slot_index: Tensor
    expected_positives: float


@TASK_UTILS.register_module()
class DenoisingGenerator:
    """Make several groups of noised copies of the ground truth.

    Args:
        groups: Number of groups.
        noise_scale: Factor of the noise, which spans half the box size for 1.
        noise_trans: Metres added to the half size before scaling.
        split: Noise whose norm exceeds it turns the label into background.
    """

    def __init__(
        self, groups: int = 10, noise_scale: float = 1.0, noise_trans: float = 0.0, split: float = 0.75
    ) -> None:
        self.groups = groups
        self.noise_scale = noise_scale
        self.noise_trans = noise_trans
        self.split = split

    def generate(
        self,
        gt_boxes: Sequence[Tensor],
        gt_labels: Sequence[Tensor],
        *,
        num_classes: int,
        pc_range: Tensor,
        num_queries: int,
        num_keys: int,
        noise: Tensor | None = None,
    ) -> DenoisingQueries | None:
        """Draw the queries of a batch.

        Args:
            gt_boxes: Per sample (m, 9) with gravity centres.
            gt_labels: Per sample (m,).
            num_classes: The label of background.
            pc_range: (6,) metres.
            num_queries: Learned and propagated queries.
            num_keys: Self-attention keys without denoising: learned queries plus memory rows.
            noise: (T, 3) in [-1, 1), group by group; drawn when left out.

        Returns:
            The queries, or None if the batch has no ground truth.
        """
        counts = [len(labels) for labels in gt_labels]
        if max(counts) == 0:
            return None
        device = pc_range.device
        pad_per_group = max(counts)
        boxes = torch.cat(list(gt_boxes)).repeat(self.groups, 1)
        labels = torch.cat(list(gt_labels)).repeat(self.groups)
        sample = torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(counts)])
        slot = torch.cat([torch.arange(n, device=device) for n in counts])
        group_start = torch.arange(self.groups, device=device).repeat_interleave(len(slot)) * pad_per_group
        sample, slot = sample.repeat(self.groups), slot.repeat(self.groups) + group_start

        if noise is None:
            noise = torch.rand(len(boxes), 3, device=device) * 2 - 1
        centres = boxes[:, :3] + noise * (boxes[:, 3:6] / 2 + self.noise_trans) * self.noise_scale
        centres = ((centres - pc_range[:3]) / (pc_range[3:] - pc_range[:3])).clamp(0.0, 1.0)
        labels = torch.where(noise.norm(dim=-1) > self.split, num_classes, labels)
        pad = self.groups * pad_per_group
        reference = centres.new_zeros(len(counts), pad, 3)
        reference[sample, slot] = centres
        return DenoisingQueries(
            reference_points=reference,
            self_attn_mask=self._attention_mask(pad_per_group, num_queries, num_keys, device),
            labels=labels,
            boxes=boxes,
            sample_index=sample,
            slot_index=slot,
            expected_positives=len(labels) * math.pi / 6 * self.split**3,
        )

    def _attention_mask(self, pad_per_group: int, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        pad = self.groups * pad_per_group
        blocked = torch.zeros(pad + num_queries, pad + num_keys, dtype=torch.bool, device=device)
        # Nobody sees a denoising key, except its own group.
        blocked[:, :pad] = True
        for group in range(self.groups):
            own = slice(group * pad_per_group, (group + 1) * pad_per_group)
            blocked[own, own] = False
        return blocked
