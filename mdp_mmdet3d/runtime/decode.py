"""From the head's raw outputs to boxes (docs/streampetr.md, section 4.2), in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Detections:
    """Boxes of one frame, best first.

    Attributes:
        boxes: (n, 9) x, y, z, dx, dy, dz, yaw, vx, vy in metres, radians and metres per second, lidar frame.
            z is that of the gravity centre; MMDetection3D's boxes have their origin at z - dz / 2.
        scores: (n,) in 0..1.
        labels: (n,) indices into the manifest's ``class_names``.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def last_level(
    cls_scores: np.ndarray, bbox_preds: np.ndarray, layout: str, num_queries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (Q, C) and box codes (Q, 10) of the last level, from either layout.

    Args:
        cls_scores: (levels, 1, Q, C) if ``layout`` is native, (1, C, levels * Q) if it is autoware.
        bbox_preds: Likewise, with 10 in place of C.
        layout: ``"native"`` or ``"autoware"``.
        num_queries: Q.
    """
    if layout == "native":
        return cls_scores[-1, 0], bbox_preds[-1, 0]
    return cls_scores[0, :, -num_queries:].T, bbox_preds[0, :, -num_queries:].T


def decode(
    logits: np.ndarray,
    codes: np.ndarray,
    *,
    max_detections: int,
    post_center_range: Sequence[float],
    score_threshold: float | None = None,
) -> Detections:
    """Best (query, class) pairs whose box centre is inside the range; no NMS.

    Args:
        logits: (Q, C).
        codes: (Q, 10): centre in metres, log sizes, sin and cos of yaw, velocity.
        max_detections: Number of pairs taken before anything is dropped.
        post_center_range: x, y, z minimum and maximum in metres.
        score_threshold: Boxes at or below it are dropped; None keeps all.
    """
    order = np.argsort(-logits.ravel(), kind="stable")[:max_detections]
    queries, labels = np.divmod(order, logits.shape[1])
    scores = 1.0 / (1.0 + np.exp(-logits.ravel()[order]))
    code = codes[queries]
    yaw = np.arctan2(code[:, 6:7], code[:, 7:8])
    boxes = np.concatenate([code[:, :3], np.exp(code[:, 3:6]), yaw, code[:, 8:10]], axis=1)
    limits = np.asarray(post_center_range, dtype=boxes.dtype)
    keep = ((boxes[:, :3] >= limits[:3]) & (boxes[:, :3] <= limits[3:])).all(axis=1)
    if score_threshold is not None:
        keep &= scores > score_threshold
    return Detections(boxes[keep], scores[keep], labels[keep])
