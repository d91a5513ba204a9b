"""Records of an info file, of whatever maker: what a streaming detector needs of them is there and plausible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from mdp_mmdet3d.errors import FileFormatError
from mdp_mmdet3d.plausible import intrinsics_fault, pose_fault, step_fault, time_fault

MAKE_AGAIN = "make it again with `python tools/create_infos.py DATAROOT`"


def check_meta(metainfo: Mapping[str, Any], name: str) -> None:
    """Raise `FileFormatError` unless the file says which version of nuScenes it is of, which its evaluation needs."""
    version = metainfo.get("version")
    if not isinstance(version, str):
        raise FileFormatError(
            f"{name}: its metainfo.version is {version!r}, not a version of nuScenes such as 'v1.0-mini'; {MAKE_AGAIN}"
        )


def check_fields(record: Any, row: int, name: str, *, annotated: bool) -> None:
    """Check that a raw record has its fields and their types.

    Args:
        record: One entry of ``data_list``.
        row: Its index.
        name: The file, for errors.
        annotated: Whether ground truth is needed.

    Raises:
        FileFormatError: A field is missing or of a wrong type; names file, row, token and field.
    """
    for field, fault in _field_faults(record, annotated):
        raise FileFormatError(f"{name}: {field} of {_where(record, row)} {fault}; {MAKE_AGAIN}")


def check_values(records: Sequence[Mapping[str, Any]], name: str) -> None:
    """Check times, poses and camera matrices of records that have their fields.

    Raises:
        FileFormatError: One is not finite or not plausible; names file, row, token, field and value.
    """
    for row, record in enumerate(records):
        if (fault := time_fault(record["timestamp"])) is not None:
            raise FileFormatError(f"{name}: timestamp of {_where(record, row)} {fault}; {MAKE_AGAIN}")
    if _all_usual(records):  # a hundred times faster than one by one
        return
    for row, record in enumerate(records):
        for field, fault in _value_faults(record):
            raise FileFormatError(f"{name}: {field} of {_where(record, row)} {fault}; {MAKE_AGAIN}")


def check_steps(records: Sequence[Mapping[str, Any]], name: str) -> None:
    """Check the way from each frame to the next of its scene.

    Args:
        records: In stream order, with ``scene_token``, ``timestamp`` and ``ego_pose`` (4, 4).
        name: The file, for errors.

    Raises:
        FileFormatError: Two frames have the same time, or no vehicle drives so.
    """
    for before, after in pairwise(records):
        if before["scene_token"] != after["scene_token"]:
            continue
        elapsed_s = after["timestamp"] - before["timestamp"]
        if elapsed_s == 0:
            raise FileFormatError(
                f"{name}: frames {before['token']} and {after['token']} of one scene have the same timestamp "
                f"{after['timestamp']}"
            )
        if (fault := step_fault(before["ego_pose"], after["ego_pose"], elapsed_s)) is not None:
            raise FileFormatError(
                f"{name}: from frame {before['token']} to {after['token']} of scene {after['scene_token']} {fault}; "
                f"{MAKE_AGAIN}"
            )


def _where(record: Any, row: int) -> str:
    token = record.get("token") if isinstance(record, Mapping) else None
    return f"frame {token!r} (row {row})"


def _field_faults(record: Any, annotated: bool) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it), in the order of the record."""
    if not isinstance(record, Mapping):
        yield "the record", f"is a {type(record).__name__}, not a dictionary"
        return
    lidar, images = record.get("lidar_points"), record.get("images")
    yield from _missing(record, "token", str)
    if "scene_token" in record:
        yield from _missing(record, "scene_token", str)
    if "timestamp" not in record:
        yield "timestamp", "is missing"
    yield from _missing(record, "ego2global", (list, tuple, np.ndarray))
    yield from _missing(record, "lidar_points", Mapping)
    yield from _missing(lidar, "lidar2ego", (list, tuple, np.ndarray), "lidar_points.")
    yield from _missing(record, "images", Mapping)
    for camera, image in images.items() if isinstance(images, Mapping) else ():
        if not isinstance(image, Mapping):
            yield f"images.{camera}", f"is {image!r}, not a dictionary"
            return
        yield from _missing(image, "img_path", str, f"images.{camera}.")
        for key in ("cam2img", "lidar2cam"):
            yield from _missing(image, key, (list, tuple, np.ndarray), f"images.{camera}.")
        if "timestamp" not in image:
            yield f"images.{camera}.timestamp", "is missing"
    if annotated or "instances" in record:
        yield from _missing(record, "instances", (list, tuple))


def _missing(record: Any, key: str, kind: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if key not in record:
        yield prefix + key, "is missing" + (", but ground truth is needed here" if key == "instances" else "")
    elif not isinstance(record[key], kind) or (kind is str and not record[key]):
        names = kind if isinstance(kind, tuple) else (kind,)
        yield prefix + key, f"is {record[key]!r:.80}, not a {' or '.join(item.__name__ for item in names)}"


def _value_faults(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    poses = {"ego2global": record["ego2global"], "lidar_points.lidar2ego": record["lidar_points"]["lidar2ego"]}
    for camera, image in record["images"].items():
        prefix = f"images.{camera}."
        poses[f"{prefix}lidar2cam"] = image["lidar2cam"]
        if (fault := intrinsics_fault(image["cam2img"])) is not None:
            yield f"{prefix}cam2img", fault
        if (fault := time_fault(image["timestamp"])) is not None:
            yield f"{prefix}timestamp", fault
    for field, pose in poses.items():
        if (fault := pose_fault(pose)) is not None:
            yield field, fault


def _all_usual(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all matrices, taken together, are finite, rigid and those of cameras."""
    images = [image for record in records for image in record["images"].values()]
    try:
        poses = np.array(
            [record["ego2global"] for record in records]
            + [record["lidar_points"]["lidar2ego"] for record in records]
            + [image["lidar2cam"] for image in images],
            np.float64,
        )
        cameras = np.array([np.asarray(image["cam2img"], np.float64)[:3, :3] for image in images])
        times = np.array([image["timestamp"] for image in images], np.float64)
    except (ValueError, TypeError, IndexError):
        return False
    if poses.shape[1:] != (4, 4) or cameras.shape[1:] != (3, 3):
        return False
    rotations = poses[:, :3, :3]
    deviation = np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3))
    return bool(
        np.isfinite(poses).all()
        and np.isfinite(cameras).all()
        and np.isfinite(times).all()
        and (np.abs(times) < 1e10).all()
        and deviation.max() < 1e-3
        and (np.linalg.det(rotations) > 0).all()
        and np.allclose(poses[:, 3], [0, 0, 0, 1])
        and (cameras[:, [0, 1], [0, 1]] > 0).all()
        and np.allclose(cameras[:, 2], [0, 0, 1])
    )
