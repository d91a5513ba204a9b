"""Info files in MMDetection3D's v2 format, made from the nuScenes tables, with scene links added.

The records hold what MMDetection3D 1.4's own converter writes, plus ``scene_token``, ``prev`` and ``next`` (sample
tokens, empty at the ends of a scene), which a streaming detector needs. Image sizes come from the tables.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.data_classes import Box
from nuscenes.utils.splits import create_splits_scenes
from pyquaternion import Quaternion
from shapely.geometry import MultiPoint
from shapely.geometry import box as rectangle

from mdp_mmdet3d.datasets.conventions import CAMERAS, INFO_ATTRIBUTES, INFO_CLASSES, LIDAR
from mdp_mmdet3d.errors import FileFormatError, MissingDatasetError
from mdp_mmdet3d.files import atomic_path
from mdp_mmdet3d.together import appear_together

MAX_SWEEPS = 10
SPLITS = {
    "v1.0-mini": {"train": "mini_train", "val": "mini_val"},
    "v1.0-trainval": {"train": "train", "val": "val"},
    "v1.0-test": {"test": "test"},
}
"""Which of the devkit's splits an info file of each version covers."""

Progress = Callable[[Iterable[dict]], Iterable[dict]]


def create_infos(dataroot: str | Path, version: str = "v1.0-mini", progress: Progress = iter) -> dict[str, Path]:
    """Write ``nuscenes_infos_{train,val}.pkl`` (or ``_test``) next to the tables, all or none.

    Args:
        dataroot: Folder that holds ``version/``, ``samples/`` and ``maps/``.
        version: One of ``SPLITS``.
        progress: Wraps the iteration over samples, e.g. to draw a bar.

    Returns:
        Split name to written file.

    Raises:
        MissingDatasetError: There are no tables of this version, or none of its scenes is in a split.
        WriteError: The disk is full, or the folder cannot be written.
    """
    nusc = load_tables(dataroot, version)
    scene_split = _splits_of_scenes(nusc, version)
    records: dict[str, list[dict]] = {split: [] for split in SPLITS[version]}
    for sample in progress(nusc.sample):
        split = scene_split.get(sample["scene_token"])
        if split is not None:
            records[split].append(sample_record(nusc, sample, len(records[split]), annotated=split != "test"))
    if not any(records.values()):
        raise MissingDatasetError(
            f"no scene of {dataroot} ({version}) belongs to the splits {sorted(SPLITS[version].values())}"
        )
    names = {split: f"nuscenes_infos_{split}.pkl" for split in records}
    with appear_together(dataroot, tuple(names.values())) as part:
        for split, rows in records.items():
            _dump({"metainfo": _metainfo(nusc, version), "data_list": rows}, part / names[split])
    return {split: Path(dataroot) / name for split, name in names.items()}


def annotate_infos(info_file: str | Path, dataroot: str | Path) -> Path:
    """Add ``scene_token``, ``prev`` and ``next`` to a stock v2 info file, in place and atomically.

    Args:
        info_file: File written by MMDetection3D's converter.
        dataroot: nuScenes folder with the tables of the version that the file names.

    Raises:
        FileFormatError: No v2 info file, or a token that the tables do not know.
        MissingDatasetError: The tables are not there.
    """
    try:
        with Path(info_file).open("rb") as stream:
            content = pickle.load(stream)
        version, records = content["metainfo"]["version"], content["data_list"]
    except FileNotFoundError as error:
        raise MissingDatasetError(f"info file {info_file} does not exist") from error
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise FileFormatError(
            f"{info_file} is no v2 info file ({type(error).__name__}: {error}); make it again with "
            f"`python tools/create_infos.py {dataroot}`"
        ) from error
    samples = {sample["token"]: sample for sample in load_tables(dataroot, version).sample}
    for row, record in enumerate(records):
        if record.get("token") not in samples:
            raise FileFormatError(
                f"row {row} of {info_file} has token {record.get('token')!r}, which {dataroot} ({version}) does not "
                "know; annotate the file with the data set it was made from"
            )
        sample = samples[record["token"]]
        record.update(scene_token=sample["scene_token"], prev=sample["prev"], next=sample["next"])
    _dump(content, Path(info_file))
    return Path(info_file)


def load_tables(dataroot: str | Path, version: str) -> NuScenes:
    """Open the tables with the devkit.

    Raises:
        MissingDatasetError: Unknown version, or no such tables.
    """
    if version not in SPLITS:
        raise MissingDatasetError(f"unknown nuScenes version {version!r}; known are {', '.join(SPLITS)}")
    tables = Path(dataroot) / version
    if not tables.is_dir():
        found = sorted(path.name for path in Path(dataroot).glob("v1.0-*")) or ["none"]
        raise MissingDatasetError(
            f"no nuScenes tables at {tables} (versions found: {', '.join(found)}). Give another --version, or write "
            f"the miniature data set with `python tools/create_mini_nuscenes.py {dataroot}`"
        )
    return NuScenes(version=version, dataroot=str(dataroot), verbose=False)


def sample_record(nusc: NuScenes, sample: dict, index: int, annotated: bool = True) -> dict[str, Any]:
    """The v2 record of one key frame.

    Args:
        nusc: Tables.
        sample: Row of the sample table.
        index: Row in the info file.
        annotated: Whether ground truth is added.

    Returns:
        Record in the layout of MMDetection3D 1.4 plus scene links. Poses are (4, 4) lists rounded to float32, times in
        seconds, boxes ``[x, y, z, l, w, h, yaw]`` with the gravity centre in the lidar frame.
    """
    lidar = nusc.get("sample_data", sample["data"][LIDAR])
    lidar2ego, ego2global = _sensor_pose(nusc, lidar), _ego_pose(nusc, lidar)
    global2lidar = np.linalg.inv(ego2global @ lidar2ego)
    record: dict[str, Any] = {
        "sample_idx": index,
        "token": sample["token"],
        "timestamp": sample["timestamp"] / 1e6,
        "scene_token": sample["scene_token"],
        "prev": sample["prev"],
        "next": sample["next"],
        "ego2global": _as_list(ego2global),
        "images": {camera: _camera_record(nusc, sample["data"][camera], global2lidar) for camera in CAMERAS},
        "lidar_points": {
            "num_pts_feats": 5,
            "lidar_path": Path(lidar["filename"]).name,
            "lidar2ego": _as_list(lidar2ego),
        },
    }
    sweeps = _sweep_records(nusc, lidar, global2lidar)
    if sweeps:
        record["lidar_sweeps"] = sweeps
    if annotated:
        record["instances"] = [_instance(nusc, token, global2lidar) for token in sample["anns"]]
        record["cam_instances"] = {
            camera: camera_instances(nusc, sample["data"][camera], sample["anns"]) for camera in CAMERAS
        }
    return record


def camera_instances(nusc: NuScenes, sample_data_token: str, annotations: list[str]) -> list[dict[str, Any]]:
    """What one camera sees of the annotations: 2D boxes, projected centres, depths and boxes in the camera frame.

    Objects whose centre is not in front of the camera, whose hull misses the image, or that belong to none of the ten
    detection classes are left out.
    """
    data = nusc.get("sample_data", sample_data_token)
    calibration = nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
    intrinsics = np.array(calibration["camera_intrinsic"])
    global2cam = np.linalg.inv(_ego_pose(nusc, data) @ _sensor_pose(nusc, data))
    instances = []
    for token in annotations:
        label = _label(nusc.get("sample_annotation", token)["category_name"])
        if label < 0:
            continue
        box = _transformed_box(nusc, token, global2cam)
        bbox = projected_bbox(box.corners(), intrinsics, (data["width"], data["height"]))
        if bbox is None or box.center[2] <= 0:
            continue
        width, length, height = box.wlh
        velocity = global2cam[:3, :3] @ np.array([*nusc.box_velocity(token)[:2], 0.0])
        center = intrinsics @ box.center
        instances.append(
            {
                "bbox": bbox,
                "bbox_label": label,
                "bbox_label_3d": label,
                "bbox_3d_isvalid": True,
                "bbox_3d": [*box.center.tolist(), length, height, width, -box.orientation.yaw_pitch_roll[0]],
                "velocity": velocity[[0, 2]].tolist(),
                "center_2d": (center[:2] / center[2]).tolist(),
                "depth": float(box.center[2]),
                "attr_label": _attribute_label(nusc, token),
            }
        )
    return instances


def projected_bbox(
    corners: NDArray[np.float64], intrinsics: NDArray[np.float64], image_size: tuple[int, int]
) -> list[float] | None:
    """Bounding rectangle of the part of a box's projected hull that lies inside the image.

    Args:
        corners: (3, 8) in the camera frame; those behind the camera are ignored, as nuScenes does.
        intrinsics: (3, 3).
        image_size: (width, height) in pixels.

    Returns:
        ``[x1, y1, x2, y2]`` in pixels, or None if the hull has no area inside the image.
    """
    corners = corners[:, corners[2] > 0]
    if corners.shape[1] < 3:
        return None
    pixels = intrinsics @ corners
    visible = MultiPoint((pixels[:2] / pixels[2]).T).convex_hull.intersection(rectangle(0, 0, *image_size))
    if visible.area <= 0:
        return None
    return [float(value) for value in visible.bounds]


def _camera_record(nusc: NuScenes, token: str, global2lidar: NDArray) -> dict[str, Any]:
    data = nusc.get("sample_data", token)
    cam2ego = _sensor_pose(nusc, data)
    # The camera fired at another time than the lidar: the way leads over the global frame.
    cam2lidar = global2lidar @ _ego_pose(nusc, data) @ cam2ego
    return {
        "img_path": Path(data["filename"]).name,
        "cam2img": nusc.get("calibrated_sensor", data["calibrated_sensor_token"])["camera_intrinsic"],
        "sample_data_token": token,
        "timestamp": data["timestamp"] / 1e6,
        "cam2ego": _as_list(cam2ego),
        "lidar2cam": _as_list(np.linalg.inv(cam2lidar)),
    }


def _sweep_records(nusc: NuScenes, lidar: dict, global2lidar: NDArray) -> list[dict[str, Any]]:
    """Up to ``MAX_SWEEPS`` earlier lidar sweeps of the scene, latest first."""
    sweeps: list[dict[str, Any]] = []
    while lidar["prev"] and len(sweeps) < MAX_SWEEPS:
        lidar = nusc.get("sample_data", lidar["prev"])
        sensor2ego, ego2global = _sensor_pose(nusc, lidar), _ego_pose(nusc, lidar)
        sweeps.append(
            {
                "timestamp": lidar["timestamp"] / 1e6,
                "sample_data_token": lidar["token"],
                "ego2global": _as_list(ego2global),
                "lidar_points": {
                    "num_pts_feats": 5,
                    "lidar_path": lidar["filename"],
                    "lidar2ego": _as_list(sensor2ego),
                    "lidar2sensor": _as_list(np.linalg.inv(global2lidar @ ego2global @ sensor2ego)),
                },
            }
        )
    return sweeps


def _instance(nusc: NuScenes, token: str, global2lidar: NDArray) -> dict[str, Any]:
    annotation = nusc.get("sample_annotation", token)
    box = _transformed_box(nusc, token, global2lidar)
    width, length, height = box.wlh
    velocity = global2lidar[:3, :3] @ np.array([*nusc.box_velocity(token)[:2], 0.0])
    label = _label(annotation["category_name"])
    return {
        "bbox_3d": [*box.center.tolist(), length, width, height, box.orientation.yaw_pitch_roll[0]],
        "bbox_label": label,
        "bbox_label_3d": label,
        "bbox_3d_isvalid": annotation["num_lidar_pts"] + annotation["num_radar_pts"] > 0,
        "num_lidar_pts": annotation["num_lidar_pts"],
        "num_radar_pts": annotation["num_radar_pts"],
        "velocity": velocity[:2].tolist(),
    }


def _transformed_box(nusc: NuScenes, token: str, transform: NDArray) -> Box:
    """Box of an annotation after a rigid (4, 4) transform from the global frame."""
    box = nusc.get_box(token)
    box.rotate(Quaternion(matrix=transform[:3, :3], rtol=1e-5, atol=1e-7))
    box.translate(transform[:3, 3])
    return box


def _label(category: str) -> int:
    """Label in the info files' order; -1 for what is not among the ten detection classes."""
    name = category_to_detection_name(category)
    return -1 if name is None else INFO_CLASSES.index(name)


def _attribute_label(nusc: NuScenes, token: str) -> int:
    attributes = nusc.get("sample_annotation", token)["attribute_tokens"]
    return INFO_ATTRIBUTES.index(nusc.get("attribute", attributes[0])["name"] if attributes else "None")


def _sensor_pose(nusc: NuScenes, data: dict) -> NDArray[np.float64]:
    return _rigid(nusc.get("calibrated_sensor", data["calibrated_sensor_token"]))


def _ego_pose(nusc: NuScenes, data: dict) -> NDArray[np.float64]:
    return _rigid(nusc.get("ego_pose", data["ego_pose_token"]))


def _rigid(row: dict) -> NDArray[np.float64]:
    matrix = np.eye(4)
    matrix[:3, :3] = Quaternion(row["rotation"]).rotation_matrix
    matrix[:3, 3] = row["translation"]
    return matrix


def _as_list(matrix: NDArray) -> list[list[float]]:
    """Rounded to float32, as MMDetection3D stores poses."""
    return matrix.astype(np.float32).tolist()


def _splits_of_scenes(nusc: NuScenes, version: str) -> dict[str, str]:
    """Scene token to the name of its info file; scenes of other splits are absent."""
    names = create_splits_scenes()
    splits = {scene: split for split, official in SPLITS[version].items() for scene in names[official]}
    return {scene["token"]: splits[scene["name"]] for scene in nusc.scene if scene["name"] in splits}


def _metainfo(nusc: NuScenes, version: str) -> dict[str, Any]:
    """Label numbers; names outside the ten classes that occur in the data are listed with -1, as stock does."""
    categories = {name: label for label, name in enumerate(INFO_CLASSES)}
    used = {annotation["category_name"] for annotation in nusc.sample_annotation}
    categories.update({name: -1 for name in sorted(used) if _label(name) < 0})
    return {"categories": categories, "dataset": "nuscenes", "version": version, "info_version": "1.1"}


def _dump(content: dict[str, Any], path: Path) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        pickle.dump(content, stream, protocol=4)
