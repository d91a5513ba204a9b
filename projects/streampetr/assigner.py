"""One-to-one matching of predictions to ground truth."""

from __future__ import annotations

import torch
from mmdet3d.registry import TASK_UTILS
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# Velocity does not take part in the matching (with it the official option is `match_with_velo`).
NUM_MATCHED_CODES = 8


def focal_cost(logits: Tensor, alpha: float = 0.25, gamma: float = 2.0, eps: float = 1e-12) -> Tensor:
    """Cost (n, num_classes) of giving query n the class: focal loss as that class minus as background."""
    p = logits.sigmoid()
    negative = -(1 - p + eps).log() * (1 - alpha) * p.pow(gamma)
    positive = -(p + eps).log() * alpha * (1 - p).pow(gamma)
    return positive - negative


@TASK_UTILS.register_module()
class StreamPETRHungarianAssigner:
    """Hungarian assignment on focal plus weighted L1 cost (arXiv 2303.11926, DETR3D's matching).

    Args:
        cls_weight: Weight of the focal cost.
        bbox_weight: Weight of the L1 cost.
        alpha: Balance of the focal cost.
        gamma: Exponent of the focal cost.
    """

    def __init__(
        self, cls_weight: float = 2.0, bbox_weight: float = 0.25, alpha: float = 0.25, gamma: float = 2.0
    ) -> None:
        self.cls_weight = cls_weight
        self.bbox_weight = bbox_weight
        self.alpha = alpha
        self.gamma = gamma

    @torch.no_grad()
    def assign(
        self, logits: Tensor, codes: Tensor, gt_labels: Tensor, gt_codes: Tensor, code_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Match the queries of one sample.

        Args:
            logits: (n, num_classes).
            codes: (n, 10).
            gt_labels: (m,) class indices.
            gt_codes: (m, 10).
            code_weights: (10,) factors of predicted and true codes.

        Returns:
            Indices of the matched queries and of their ground truth, both (min(n, m),).
        """
        k = NUM_MATCHED_CODES
        focal = focal_cost(logits, self.alpha, self.gamma)[:, gt_labels]
        cost = self.cls_weight * focal + self.bbox_weight * torch.cdist(
            (codes * code_weights)[:, :k], (gt_codes * code_weights)[:, :k], p=1
        )
        cost = torch.nan_to_num(cost, nan=100.0, posinf=100.0, neginf=-100.0)
        rows, columns = linear_sum_assignment(cost.cpu().numpy())
        return (
            torch.as_tensor(rows, dtype=torch.long, device=logits.device),
            torch.as_tensor(columns, dtype=torch.long, device=logits.device),
        )
