"""A recorded drive on disk: image files and ``drive.json`` with poses, times and calibration."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mdp_mmdet3d.errors import FileFormatError
from mdp_mmdet3d.files import read_json, write_json
from mdp_mmdet3d.runtime.images import read_image
from mdp_mmdet3d.runtime.preprocess import CameraFrame

DRIVE_FILE = "drive.json"
SCHEMA_VERSION = 1


def write_drive(folder: str | Path, frames: Iterable[CameraFrame]) -> None:
    """Write frames as PNG images and ``drive.json``, one after the other; `load_drive` gives back the same."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for index, frame in enumerate(frames):
        cameras = {}
        for name, image in frame.images.items():
            file = f"{index:06d}_{name}.png"
            Image.fromarray(image).save(folder / file)
            cameras[name] = {
                "file": file,
                "intrinsics": np.asarray(frame.intrinsics[name], np.float64).tolist(),
                "lidar2cam": np.asarray(frame.lidar2cam[name], np.float64).tolist(),
            }
        records.append(
            {
                "timestamp_s": frame.timestamp,
                "scene_token": frame.scene_token,
                "prev_exists": frame.prev_exists,
                "ego_pose": np.asarray(frame.ego_pose, np.float64).tolist(),
                "cameras": cameras,
            }
        )
    write_json(folder / DRIVE_FILE, {"schema_version": SCHEMA_VERSION, "frames": records})


def load_drive(folder: str | Path) -> Iterator[CameraFrame]:
    """Frames of a drive in order, images decoded as they are asked for.

    Raises:
        FileFormatError: ``drive.json`` is missing or malformed, or an image is missing or damaged.
    """
    folder = Path(folder)
    data = read_json(folder / DRIVE_FILE, what="recorded drive", schema_version=SCHEMA_VERSION)
    if not data.get("frames"):
        raise FileFormatError(f"recorded drive {folder / DRIVE_FILE} has no frames")
    for index, record in enumerate(data["frames"]):
        try:
            yield _frame(folder, record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError(f"frame {index} of {folder / DRIVE_FILE} is malformed ({error!r})") from error


def repeat_drive(folder: str | Path) -> Iterator[CameraFrame]:
    """Endless stream over a drive, images decoded as they are asked for: every pass is a scene of its own.

    Raises:
        FileFormatError: As `load_drive`.
    """
    for number in itertools.count():
        for frame in load_drive(folder):
            yield replace(frame, scene_token=f"{frame.scene_token}#{number}")


def _frame(folder: Path, record: dict[str, Any]) -> CameraFrame:
    cameras = record["cameras"]
    return CameraFrame(
        images={name: _image(folder / camera["file"]) for name, camera in cameras.items()},
        intrinsics={name: np.array(camera["intrinsics"], np.float64) for name, camera in cameras.items()},
        lidar2cam={name: np.array(camera["lidar2cam"], np.float64) for name, camera in cameras.items()},
        ego_pose=np.array(record["ego_pose"], np.float64),
        timestamp=float(record["timestamp_s"]),
        scene_token=str(record["scene_token"]),
        prev_exists=_flag(record["prev_exists"]),
    )


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"prev_exists is {value!r}, not true or false")
    return value


def _image(path: Path) -> np.ndarray:
    try:
        return read_image(path)
    except FileNotFoundError as error:
        raise FileFormatError(f"image {path} is missing: {error}") from error
