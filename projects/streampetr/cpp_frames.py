"""Recorded frames as the public C++ application for StreamPETR reads them (docs/deployment.md, section 1.4).

Written from what ``AV-Solutions/streampetr-trt/inference_app`` of NVIDIA/DL4AGX reads; its code is not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.files import write_json
from mdp_mmdet3d.onnx.folders import part_folder
from mdp_mmdet3d.runtime.stream import Frame, StreamRunner
from mdp_mmdet3d.together import replace_folder

MOST_FRAMES = 9999
ABOUT = "0000"
"""The application counts the entries of the folder and reads from 1 to one less: this one is not read."""


def write_cpp_frames(deployment: str | Path, frames: Iterable[Frame], out: str | Path) -> int:
    """Write one folder per frame with the inputs of the engines and what ONNX Runtime makes of them.

    Positions begin at the first frame's: the application has poses in float32, times in float64.

    Args:
        deployment: Folder of `export_streampetr`; its head has no ``prev_exists``, its encoder takes all cameras.
        frames: Of one scene, in order; read one by one.
        out: The application's ``data``; it must not exist or be empty.

    Returns:
        Number of frames.

    Raises:
        DeploymentError: The deployment is not what the application runs, there is no frame or too many, a second scene
            begins, a frame is refused by `StreamRunner.run`, or ``out`` is not empty.
        FileFormatError: The deployment is incomplete or has changed.
        WriteError: ``out`` cannot be written.
    """
    out = Path(out)
    runner = StreamRunner(deployment)
    manifest = runner.manifest
    if any(spec.name == "prev_exists" for spec in manifest.engines["head"].inputs):
        raise DeploymentError(f"{deployment} has a prev_exists input, which the application does not feed")
    if manifest.encoder_batch != len(manifest.camera_names):
        raise DeploymentError(f"{deployment} encodes one camera at a time, the application all: no --encoder-batch")
    if out.exists() and any(out.iterdir()):
        raise DeploymentError(f"{out} is not empty; give another folder")
    points = manifest.pseudo_reference_points(deployment)
    first: Frame | None = None
    count = 0
    with part_folder(out) as part:
        made = part / "new"
        for count, frame in enumerate(frames, start=1):
            if count > MOST_FRAMES:
                raise DeploymentError(f"more than {MOST_FRAMES} frames: the application has names of four digits")
            if first is None:
                first = frame
            elif frame.scene_token != first.scene_token or not frame.prev_exists:
                raise DeploymentError(
                    f"frame {count} begins another scene, and the application never resets: stop there"
                )
            folder = made / f"{count:04d}"
            folder.mkdir(parents=True)
            output = runner.run(frame)
            pose = frame.ego_pose.copy()
            pose[:3, 3] -= first.ego_pose[:3, 3]
            arrays = {
                "img": frame.img,
                **runner.rig_outputs,
                "data_ego_pose": pose,
                "data_ego_pose_inv": np.linalg.inv(pose),
                "all_cls_scores": output.cls_scores,
                "all_bbox_preds": output.bbox_preds,
            }
            if frame is first:
                shape = next(s for s in manifest.engines["head"].inputs if s.name == "pre_memory_embedding").shape
                arrays |= _initial_memory(pose, points, shape)
                np.zeros(shape[1], np.float64).tofile(folder / "prev_memory_timestamp.bin")
            for name, array in arrays.items():
                np.ascontiguousarray(array, np.float32).tofile(folder / f"{name}.bin")
            np.array([frame.timestamp], np.float64).tofile(folder / "data_timestamp.bin")
        if first is None:
            raise DeploymentError("there is no frame to write")
        (made / ABOUT).mkdir()
        write_json(
            made / ABOUT / "about.json",
            {
                "frames": count,
                "cameras": list(manifest.camera_names),
                "classes": list(manifest.class_names),
                "plan_hash": manifest.plan_hash,
                "weights": manifest.weights,
                "precision": manifest.precision,
                "pre_memory_length": manifest.memory.pre_length,
                "post_memory_length": manifest.memory.post_length,
                "position_0_m": first.ego_pose[:3, 3].tolist(),
            },
        )
        replace_folder(made, out)
    return count


def _initial_memory(pose: np.ndarray, points: np.ndarray, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Memory before the first frame in global coordinates; ``init_memory.json`` of a deployment has the rule."""
    length, propagated = shape[1], len(points)
    reference = np.tile(pose[:3, 3], (length, 1))
    reference[:propagated] = points @ pose[:3, :3].T + pose[:3, 3]
    egopose = np.zeros((length, 4, 4))
    egopose[:propagated] = pose
    return {
        "init_memory_embedding": np.zeros(shape),
        "init_memory_reference_point": reference,
        "init_memory_egopose": egopose,
        "init_memory_velo": np.zeros((length, 2)),
    }
