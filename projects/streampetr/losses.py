"""3D losses of StreamPETR on every decoder level, for matched and for denoising queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmdet.utils import reduce_mean
from mmdet3d.registry import MODELS, TASK_UTILS
from torch import Tensor, nn

from .box_coder import encode_boxes
from .denoising import DenoisingQueries


@MODELS.register_module()
class StreamPETRLoss(nn.Module):
    """Sigmoid focal loss of the classes and weighted L1 loss of the box codes.

    Args:
        loss_cls: Config of the classification loss; mmdet's focal loss with gamma 2, alpha 0.25, weight 2 by
            default.
        bbox_weight: Weight of the L1 loss.
        dn_weight: Weight of the denoising losses.
        assigner: Config of the assigner.
    """

    def __init__(
        self,
        loss_cls: dict | None = None,
        bbox_weight: float = 0.25,
        dn_weight: float = 1.0,
        assigner: dict | None = None,
    ) -> None:
        super().__init__()
        focal = {
            "type": "mmdet.FocalLoss",
            "use_sigmoid": True,
            "gamma": 2.0,
            "alpha": 0.25,
            "loss_weight": 2.0,
        }
        self.loss_cls = MODELS.build(loss_cls or focal)
        self.assigner = TASK_UTILS.build(assigner or {"type": "StreamPETRHungarianAssigner"})
        self.bbox_weight = bbox_weight
        self.dn_weight = dn_weight

    def forward(
        self,
        cls_scores: Tensor,
        bbox_preds: Tensor,
        gt_boxes: Sequence[Tensor],
        gt_labels: Sequence[Tensor],
        code_weights: Tensor,
        match_costs: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of the matched queries.

        Args:
            cls_scores: (levels, B, n, num_classes) logits.
            bbox_preds: (levels, B, n, 10).
            gt_boxes: Per sample (m, 9): gravity centre, sizes, yaw, velocity (NaN velocities are allowed).
            gt_labels: Per sample (m,).
            code_weights: (10,) factors of the L1 loss.
            match_costs: (10,) factors of the L1 cost of the matching.

        Returns:
            ``loss_cls`` and ``loss_bbox`` of the last level; those of level i are prefixed ``d<i>.``.
        """
        gt_codes = [encode_boxes(boxes) for boxes in gt_boxes]
        losses = {}
        for prefix, scores, boxes in _levels(cls_scores, bbox_preds):
            matches = [self.assigner.assign(*sample, match_costs) for sample in zip(scores, boxes, gt_labels, gt_codes)]
            sample_index = torch.cat([q.new_full(q.shape, i) for i, (q, _) in enumerate(matches)])
            query_index = torch.cat([q for q, _ in matches])
            labels = torch.full(scores.shape[:2], scores.shape[-1], dtype=torch.long, device=scores.device)
            labels[sample_index, query_index] = torch.cat([lab[g] for lab, (_, g) in zip(gt_labels, matches)])
            targets = torch.cat([codes[g] for codes, (_, g) in zip(gt_codes, matches)])
            num_pos = len(query_index)
            losses[prefix + "loss_cls"] = self._classification(scores.flatten(0, 1), labels.flatten(), num_pos)
            losses[prefix + "loss_bbox"] = self._regression(
                boxes[sample_index, query_index], targets, code_weights, num_pos
            )
        return losses

    def denoising(
        self, cls_scores: Tensor, bbox_preds: Tensor, queries: DenoisingQueries, code_weights: Tensor
    ) -> dict[str, Tensor]:
        """Losses of the denoising queries.

        Args:
            cls_scores: (levels, B, pad, num_classes) logits.
            bbox_preds: (levels, B, pad, 10).
            queries: What the slots hold.
            code_weights: (10,).

        Returns:
            ``dn_loss_cls`` and ``dn_loss_bbox``, those of level i prefixed ``d<i>.``.
        """
        targets = encode_boxes(queries.boxes)
        num_slots = len(queries.labels)
        slots = (queries.sample_index, queries.slot_index)
        losses = {}
        for prefix, scores, boxes in _levels(cls_scores, bbox_preds):
            losses[prefix + "dn_loss_cls"] = self.dn_weight * self._classification(
                scores[slots], queries.labels, queries.expected_positives
            )
            # Slots labelled background are regressed too, as in the official training.
            losses[prefix + "dn_loss_bbox"] = self.dn_weight * self._regression(
                boxes[slots], targets, code_weights, num_slots
            )
        return losses

    def _classification(self, logits: Tensor, labels: Tensor, num_pos: float) -> Tensor:
        return torch.nan_to_num(self.loss_cls(logits, labels, avg_factor=max(num_pos, 1.0)))

    def _regression(self, codes: Tensor, targets: Tensor, code_weights: Tensor, num_pos: int) -> Tensor:
        denominator = reduce_mean(codes.new_tensor([float(num_pos)])).clamp(min=1.0)
        finite = targets.isfinite().all(dim=-1)
        error = (codes[finite] - targets[finite]).abs() * code_weights
        return torch.nan_to_num(self.bbox_weight * error.sum() / denominator.squeeze(0))


def _levels(cls_scores: Tensor, bbox_preds: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    last = len(cls_scores) - 1
    return [("" if i == last else f"d{i}.", cls_scores[i], bbox_preds[i]) for i in range(last + 1)]
