"""nuScenes leaderboard submissions: one JSON file with every key frame of a split, checked and zipped."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nuscenes.eval.common.loaders import load_prediction
from nuscenes.eval.detection.data_classes import DetectionBox
from nuscenes.eval.detection.utils import detection_name_to_rel_attributes

from mdp_mmdet3d.errors import FileFormatError
from mdp_mmdet3d.together import appear_together

MAX_BOXES_PER_SAMPLE = 500
UNIT_TOLERANCE = 1e-2
META = {"use_camera": True, "use_lidar": False, "use_radar": False, "use_map": False, "use_external": False}


def write_submission(
    results: Mapping[str, list[dict[str, Any]]],
    sample_tokens: Iterable[str],
    path: str | Path,
    use_external: bool = False,
) -> Path:
    """Write and check a submission.

    Args:
        results: Boxes per sample token as MMDetection3D's ``NuScenesMetric`` formats them; of a sample with more than
            ``MAX_BOXES_PER_SAMPLE`` the best are kept, one without boxes may be missing.
        sample_tokens: All key frames of the split.
        path: The ``.json`` file; a ``.zip`` with it is written beside.
        use_external: Whether the weights have seen data other than nuScenes and ImageNet.

    Returns:
        The zip file.

    Raises:
        FileFormatError: There are boxes of unknown samples, or a box that the devkit or the rules would refuse.
    """
    path = Path(path)
    tokens = list(sample_tokens)
    unknown = sorted(set(results) - set(tokens))
    if unknown:
        raise FileFormatError(
            f"{len(unknown)} samples with boxes are not in the split, e.g. {unknown[0]}; evaluate the split that is "
            "submitted"
        )
    best = {
        token: sorted(results.get(token, ()), key=lambda box: -box["detection_score"])[:MAX_BOXES_PER_SAMPLE]
        for token in tokens
    }
    content = {"meta": {**META, "use_external": use_external}, "results": best}
    archive = path.with_suffix(".zip")
    with appear_together(path.parent, (path.name, archive.name)) as part:
        (part / path.name).write_text(json.dumps(content), encoding="utf-8")
        check_submission(part / path.name, tokens)
        with zipfile.ZipFile(part / archive.name, "w", zipfile.ZIP_DEFLATED) as stream:
            stream.write(part / path.name, arcname=path.name)
    return archive


def check_submission(path: str | Path, sample_tokens: Iterable[str]) -> None:
    """Load a submission with the devkit's own loader and check what only the evaluation server would find.

    Args:
        path: The ``.json`` file.
        sample_tokens: All key frames of the split.

    Raises:
        FileFormatError: It would be refused; the message says why.
    """
    try:
        boxes, meta = load_prediction(str(path), MAX_BOXES_PER_SAMPLE, DetectionBox, verbose=False)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"the nuScenes devkit refuses {path}: {error}") from error
    missing = set(META) - set(meta)
    if missing:
        raise FileFormatError(f"{path} lacks the meta flags {sorted(missing)}")
    if set(boxes.sample_tokens) != set(sample_tokens):
        count = len(set(sample_tokens) ^ set(boxes.sample_tokens))
        raise FileFormatError(f"{path} must hold exactly the samples of the split; {count} are missing or too many")
    for box in boxes.all:
        numbers = [*box.translation, *box.size, *box.rotation, *box.velocity, box.detection_score]
        if not all(math.isfinite(value) for value in numbers):
            raise FileFormatError(f"{path}: a {box.detection_name} of sample {box.sample_token} is not finite")
        norm = math.sqrt(sum(value**2 for value in box.rotation))
        for fault in (
            min(box.size) <= 0 and f"has the size {box.size}, which must be positive",
            not 0 <= box.detection_score <= 1 and f"has the score {box.detection_score}, which must be in 0..1",
            abs(norm - 1) > UNIT_TOLERANCE and f"has the rotation {box.rotation}, which is no unit quaternion",
        ):
            if fault:
                raise FileFormatError(f"{path}: a {box.detection_name} of sample {box.sample_token} {fault}")
        allowed = detection_name_to_rel_attributes(box.detection_name)
        if box.attribute_name and box.attribute_name not in allowed:
            raise FileFormatError(
                f"{path}: a {box.detection_name} of sample {box.sample_token} has the attribute "
                f"{box.attribute_name!r}; allowed are {allowed or 'none'}"
            )
