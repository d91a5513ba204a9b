"""Box code (cx, cy, cz, log dx, log dy, log dz, sin yaw, cos yaw, vx, vy) and decoding without NMS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmdet3d.registry import TASK_UTILS
from torch import Tensor


def encode_boxes(boxes: Tensor) -> Tensor:
    """Boxes (n, 9) with gravity centre, sizes, yaw and velocity to codes (n, 10)."""
    yaw = boxes[:, 6:7]
    return torch.cat((boxes[:, :3], boxes[:, 3:6].log(), yaw.sin(), yaw.cos(), boxes[:, 7:9]), dim=-1)


def decode_boxes(codes: Tensor) -> Tensor:
    """Codes (n, 10) to boxes (n, 9) with gravity centre, sizes, yaw and velocity."""
    yaw = torch.atan2(codes[:, 6:7], codes[:, 7:8])
    return torch.cat((codes[:, :3], codes[:, 3:6].exp(), yaw, codes[:, 8:10]), dim=-1)


class Detections(NamedTuple):
    """Decoded boxes of one sample, best first.

    Attributes:
        bboxes: (n, 9) gravity centre, sizes, yaw, velocity.
        scores: (n,).
        labels: (n,) class indices.
    """

    bboxes: Tensor
    scores: Tensor
    labels: Tensor


@TASK_UTILS.register_module()
class StreamPETRBoxCoder:
    """Take the best (query, class) pairs, decode, and keep centres inside a range.

    Args:
        post_center_range: Minimum and maximum corner in metres.
        max_num: Pairs to take, before the range is applied.
        score_threshold: Keep only scores above it; None keeps all.
    """

    def __init__(
        self,
        post_center_range: Sequence[float] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0),
        max_num: int = 300,
        score_threshold: float | None = None,
    ) -> None:
        self.post_center_range = tuple(post_center_range)
        self.max_num = max_num
        self.score_threshold = score_threshold

    def decode(self, cls_scores: Tensor, bbox_preds: Tensor) -> list[Detections]:
        """Decode the last level.

        Args:
            cls_scores: (B, n, num_classes) logits.
            bbox_preds: (B, n, 10) codes with centres in metres.

        Returns:
            One :class:`Detections` per sample.
        """
        return [self._decode_one(scores, codes) for scores, codes in zip(cls_scores, bbox_preds)]

    def _decode_one(self, logits: Tensor, codes: Tensor) -> Detections:
        num_classes = logits.shape[-1]
        scores, index = logits.sigmoid().flatten().topk(min(self.max_num, logits.numel()))
        boxes = decode_boxes(codes[index // num_classes])
        limits = boxes.new_tensor(self.post_center_range)
        keep = ((boxes[:, :3] >= limits[:3]) & (boxes[:, :3] <= limits[3:])).all(dim=1)
        if self.score_threshold is not None:
            keep &= scores > self.score_threshold
        return Detections(boxes[keep], scores[keep], (index % num_classes)[keep])
