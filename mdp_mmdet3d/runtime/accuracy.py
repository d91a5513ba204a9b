"""What a change of precision does to the boxes: two deployments over the same frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime.decode import Detections
from mdp_mmdet3d.runtime.stream import Frame, StreamRunner

MATCH_DISTANCE_M = 0.5
BOXES_PER_FRAME = 100


@dataclass(frozen=True)
class BoxAgreement:
    """How many boxes of a reference a candidate finds again, each keeping its own memory.

    Attributes:
        frames: Frames compared.
        boxes: Best boxes of the reference over all frames, at most `BOXES_PER_FRAME` each.
        matched_share: Share of them for which the candidate has a box of the same class whose centre on the ground
            is within `MATCH_DISTANCE_M`, greedily by distance, one to one.
        mean_distance_m: Of the matched pairs, on the ground.
        mean_score_difference: Mean absolute, of the matched pairs.
        max_logit_difference: Largest over all queries in the first frame of every stream, where both have the
            same memory.
    """

    frames: int
    boxes: int
    matched_share: float
    mean_distance_m: float
    mean_score_difference: float
    max_logit_difference: float

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary for ``deployment.json``."""
        return {**asdict(self), "match_distance_m": MATCH_DISTANCE_M}


def compare_boxes(reference: StreamRunner, candidate: StreamRunner, frames: Sequence[Frame]) -> BoxAgreement:
    """Stream ``frames`` through both and match the boxes.

    Args:
        reference: E.g. the float32 deployment; its memory is reset before and after.
        candidate: E.g. the float16 deployment of the same model; likewise.
        frames: At least one.

    Raises:
        DeploymentError: There is no frame, or the two are not deployments of one model.
    """
    if not frames:
        raise DeploymentError("no frame to compare on")
    if reference.manifest.class_names != candidate.manifest.class_names:
        raise DeploymentError(f"{reference.folder} and {candidate.folder} detect different classes")
    distances: list[float] = []
    scores: list[float] = []
    logits: list[float] = []
    boxes = 0
    scene: str | None = None
    reference.reset()
    candidate.reset()
    for frame in frames:
        expected, found = reference.run(frame), candidate.run(frame)
        if frame.scene_token != scene or not frame.prev_exists:
            logits.append(float(np.abs(expected.cls_scores - found.cls_scores).max()))
        scene = frame.scene_token
        best = _first(reference.decode(expected), BOXES_PER_FRAME)
        pairs = match_boxes(best, candidate.decode(found))
        boxes += len(best.scores)
        distances += pairs[0]
        scores += pairs[1]
    reference.reset()
    candidate.reset()
    return BoxAgreement(
        frames=len(frames),
        boxes=boxes,
        matched_share=len(distances) / boxes if boxes else 1.0,
        mean_distance_m=float(np.mean(distances)) if distances else 0.0,
        mean_score_difference=float(np.mean(scores)) if scores else 0.0,
        max_logit_difference=max(logits),
    )


def match_boxes(expected: Detections, found: Detections) -> tuple[list[float], list[float]]:
    """Distances in metres and absolute score differences of the pairs, closest first."""
    gaps = np.linalg.norm(expected.boxes[:, None, :2] - found.boxes[None, :, :2], axis=2)
    gaps[expected.labels[:, None] != found.labels[None]] = np.inf
    distances, scores = [], []
    for index in np.argsort(gaps, axis=None, kind="stable"):
        row, column = divmod(int(index), gaps.shape[1])
        if not gaps[row, column] <= MATCH_DISTANCE_M:
            # Rows and columns that are taken hold infinity, so everything that is left is too far as well.
            if gaps.min(initial=np.inf) > MATCH_DISTANCE_M:
                break
            continue
        distances.append(float(gaps[row, column]))
        scores.append(float(abs(expected.scores[row] - found.scores[column])))
        gaps[row], gaps[:, column] = np.inf, np.inf
    return distances, scores


def _first(detections: Detections, count: int) -> Detections:
    return Detections(detections.boxes[:count], detections.scores[:count], detections.labels[:count])
