"""The real nuScenes frame passes through the same data set and pipeline, and everything lands where it belongs."""

from __future__ import annotations

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("mmcv", reason="mmcv is needed by mmdet3d")

from mmengine.config import Config
from mmengine.registry import init_default_scope

from mdp_mmdet3d.datasets.conventions import CAMERAS
from projects.streampetr import dataset, transforms  # noqa: F401  registers them

from ..data_files import data_path

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "streampetr_mdp_frame.py"
SCALE, TOP = 0.44, 140


@pytest.fixture(scope="module")
def folder() -> Path:
    return data_path("nuscenes_frame")


@pytest.fixture(scope="module")
def raw(folder):
    path = next(folder.glob("*.pkl"))
    with path.open("rb") as stream:
        return pickle.load(stream)["data_list"][0]


@pytest.fixture(scope="module")
def frame(folder):
    from mmdet3d.registry import DATASETS

    init_default_scope("mmdet3d")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MDP_SHARED_DATA", str(folder.parent))
        config = Config.fromfile(CONFIG)
    data = DATASETS.build(config.importance_dataloader.dataset)
    assert len(data) == 1
    return data[0]


def test_it_loads_as_a_stream_of_one(frame, raw):
    meta = frame["data_samples"].metainfo
    assert frame["inputs"]["img"].shape == (6, 3, 256, 704)
    assert meta["timestamp"] == raw["timestamp"] == 1532402927.647951
    assert meta["token"] == raw["token"]
    assert meta["prev_exists"] is False
    assert [camera in path for camera, path in zip(CAMERAS, meta["img_path"])] == [True] * 6


def test_camera_annotations_project_onto_their_recorded_centres(frame, raw):
    """cam_instances hold the boxes of the camera frame; center_2d is where the stock converter projected them."""
    meta = frame["data_samples"].metainfo
    checked = 0
    for camera, intrinsics in zip(CAMERAS, meta["intrinsics"].astype(np.float64)):
        for instance in raw["cam_instances"][camera]:
            u, v, depth, _ = intrinsics @ [*instance["bbox_3d"][:3], 1]
            expected = np.array(instance["center_2d"]) * SCALE - [0, TOP]
            np.testing.assert_allclose([u / depth, v / depth], expected, atol=0.01)
            checked += 1
    assert checked == 84


def test_lidar_boxes_project_onto_the_camera_annotations(frame, raw):
    """Through lidar2img, every camera annotation is met by a ground-truth box of the lidar frame."""
    meta = frame["data_samples"].metainfo
    centres = np.array([[*instance["bbox_3d"][:3], 1] for instance in raw["instances"]])
    distances = []
    for camera, lidar2img in zip(CAMERAS, meta["lidar2img"].astype(np.float64)):
        pixels = centres @ lidar2img.T
        pixels = pixels[pixels[:, 2] > 0.5]
        pixels = pixels[:, :2] / pixels[:, 2:3]
        for instance in raw["cam_instances"][camera]:
            expected = np.array(instance["center_2d"]) * SCALE - [0, TOP]
            distances.append(np.linalg.norm(pixels - expected, axis=1).min())
    # Cameras and lidar fire at different times; the matrices compensate the motion of the vehicle.
    assert np.max(distances) < 0.5


def test_lidar_points_on_objects_fall_into_their_image_boxes(frame, raw, folder):
    meta = frame["data_samples"].metainfo
    truth = frame["data_samples"].gt_instances_3d.bboxes_3d
    path = next(folder.glob("*LIDAR_TOP*"))
    points = np.fromfile(path, np.float32).reshape(-1, 5)[:, :3].astype(np.float64)
    homogeneous = np.pad(points, ((0, 0), (0, 1)), constant_values=1)
    inside = total = 0
    for box, corners in zip(truth.tensor.numpy(), truth.corners.numpy()):
        x, y, z, length, width, height, yaw = box[:7]
        delta = points - [x, y, z + height / 2]
        along = delta[:, 0] * np.cos(yaw) + delta[:, 1] * np.sin(yaw)
        across = delta[:, 1] * np.cos(yaw) - delta[:, 0] * np.sin(yaw)
        hits = (np.abs(along) < length / 2) & (np.abs(across) < width / 2) & (np.abs(delta[:, 2]) < height / 2)
        for lidar2img in meta["lidar2img"].astype(np.float64):
            hull = np.pad(corners, ((0, 0), (0, 1)), constant_values=1) @ lidar2img.T
            if hull[:, 2].min() < 1:
                continue
            hull = hull[:, :2] / hull[:, 2:3]
            pixels = homogeneous[hits] @ lidar2img.T
            pixels = pixels[:, :2] / pixels[:, 2:3]
            inside += ((pixels >= hull.min(0) - 1e-3) & (pixels <= hull.max(0) + 1e-3)).all(1).sum()
            total += len(pixels)
    assert total > 300
    assert inside == total


def test_labels_and_counts_agree_with_the_record(frame, raw):
    truth = frame["data_samples"].gt_instances_3d
    kept = [
        i
        for i in raw["instances"]
        if i["bbox_3d_isvalid"] and i["bbox_label_3d"] >= 0 and np.abs(i["bbox_3d"][:2]).max() < 51.2
    ]
    assert len(truth.labels_3d) == len(kept) == 50
    # Label numbers of MMDetection3D to those of the official model.
    remap = {0: 0, 1: 1, 2: 4, 3: 3, 4: 2, 5: 7, 6: 6, 7: 8, 8: 9, 9: 5}
    assert truth.labels_3d.tolist() == [remap[i["bbox_label_3d"]] for i in kept]
    np.testing.assert_allclose(truth.bboxes_3d.gravity_center, [i["bbox_3d"][:3] for i in kept], atol=1e-4)


def test_the_image_is_the_cropped_bicubic_resize(frame, raw, folder):
    from PIL import Image

    for index, camera in enumerate(CAMERAS):
        image = cv2.imread(str(folder / raw["images"][camera]["img_path"]))
        expected = np.asarray(Image.fromarray(image).resize((704, 396), Image.Resampling.BICUBIC))[140:396]
        np.testing.assert_array_equal(frame["inputs"]["img"][index].permute(1, 2, 0).numpy(), expected)
