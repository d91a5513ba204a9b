"""Images, matrices, 2D and 3D ground truth change together in training."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet3d.structures import LiDARInstance3DBoxes

from mdp_mmdet3d.datasets.conventions import CAMERAS
from mdp_mmdet3d.errors import FileFormatError, MdpError
from projects.streampetr.augmentation import (
    ImageObjects,
    LoadImageObjects,
    RandomResizeCropFlip,
    RandomRotateScaleWorld,
    transform_world,
)
from projects.streampetr.transforms import ImageAugmentation

augmentations = st.builds(
    ImageAugmentation,
    scale=st.floats(0.3, 0.7),
    crop_left=st.integers(-20, 150),
    crop_top=st.integers(0, 200),
    width=st.just(704),
    height=st.just(256),
    flip=st.booleans(),
)


def objects_of(bboxes, depths=None, camera=None) -> ImageObjects:
    bboxes = np.asarray(bboxes, np.float32).reshape(-1, 4)
    n = len(bboxes)
    return ImageObjects(
        bboxes=bboxes,
        labels=np.arange(n),
        centers_2d=(bboxes[:, :2] + bboxes[:, 2:]) / 2,
        depths=np.asarray(depths if depths is not None else np.arange(n), np.float32),
        camera=np.asarray(camera if camera is not None else np.zeros(n), np.int64),
    )


def random_frame(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    intrinsics = np.tile(np.eye(4), (6, 1, 1))
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = rng.uniform(800, 1300, 6)
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = 810, 490
    extrinsics = np.tile(np.eye(4), (6, 1, 1))
    for matrix in extrinsics:
        matrix[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        matrix[:3, 3] = rng.normal(size=3)
    pose = np.eye(4)
    pose[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    pose[:3, 3] = rng.normal(size=3) * 500
    boxes = np.concatenate(
        [rng.uniform(-40, 40, (7, 2)), rng.uniform(-2, 1, (7, 1)), rng.uniform(0.5, 9, (7, 3)),
         rng.uniform(-3, 3, (7, 1)), rng.normal(size=(7, 2)) * 5], axis=1)  # fmt: skip
    return {
        "img": [np.zeros((9, 16, 3), np.uint8)] * 6, "ori_shape": (900, 1600),
        "intrinsics": intrinsics, "extrinsics": extrinsics, "lidar2img": intrinsics @ extrinsics,
        "ego_pose": pose.astype(np.float32), "ego_pose_inv": np.linalg.inv(pose).astype(np.float32),
        "gt_bboxes_3d": LiDARInstance3DBoxes(torch.tensor(boxes, dtype=torch.float64), box_dim=9),
    }  # fmt: skip


def project(matrix, points):
    pixels = np.pad(np.asarray(points), ((0, 0), (0, 1)), constant_values=1) @ matrix.T
    return pixels[:, :2] / pixels[:, 2:3], pixels[:, 2]


@settings(max_examples=60, deadline=None)
@given(augmentation=augmentations, seed=st.integers(0, 100))
def test_2d_ground_truth_moves_with_the_pixels(augmentation, seed) -> None:
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform((0, 0), (1600, 900), (20, 2, 2)), axis=1).reshape(20, 4)
    before = objects_of(corners)
    after = before.augmented(augmentation)
    assert (after.bboxes[:, 2:] >= after.bboxes[:, :2]).all()
    limit = np.array([augmentation.width, augmentation.height])
    for row, label in enumerate(after.labels):
        pixels = np.concatenate([corners[label].reshape(2, 2), before.centers_2d[label][None]])
        moved = np.pad(pixels, ((0, 0), (0, 2)), constant_values=1) @ augmentation.matrix.T
        moved = np.clip(moved[:, :2], 0, limit)
        expected = np.concatenate([moved[:2].min(axis=0), moved[:2].max(axis=0)])
        np.testing.assert_allclose(after.bboxes[row], expected, atol=1e-2)
        np.testing.assert_allclose(after.centers_2d[row], moved[2], atol=1e-2)
        assert (after.bboxes[row, 2:] - after.bboxes[row, :2] >= 2 - 1e-3).all()
    small = ((np.clip(corners * augmentation.scale - np.tile((augmentation.crop_left, augmentation.crop_top), 2),
                      0, np.tile(limit, 2)) @ [[-1, 0], [0, -1], [1, 0], [0, 1]]) < 1.99).any(axis=1)  # fmt: skip
    assert not set(np.flatnonzero(small)) & set(after.labels.tolist())


def test_hidden_objects_are_filtered_camera_by_camera() -> None:
    far, near, beside = [10, 10, 50, 50], [5, 5, 60, 60], [80, 10, 90, 50]
    assert objects_of([far, near, beside], depths=[30, 5, 30]).visible(64, 96).tolist() == [True, True, True]
    # The farthest of a camera survives on the background; a farther one takes that place.
    everywhere = [0, 0, 2, 2]
    found = objects_of([far, near, beside, everywhere], depths=[30, 5, 30, 90]).visible(64, 96)
    assert found.tolist() == [False, True, True, True]
    other_camera = objects_of([far, near, everywhere, everywhere], depths=[30, 5, 90, 90], camera=[0, 1, 0, 1])
    assert other_camera.visible(64, 96).all()


def test_an_object_partly_covered_stays() -> None:
    found = objects_of([[0, 0, 2, 2], [10, 10, 50, 50], [5, 5, 60, 45]], depths=[90, 30, 5]).visible(64, 96)
    assert found.all()


def test_no_objects_are_no_error() -> None:
    empty = objects_of(np.zeros((0, 4)))
    assert len(empty.augmented(ImageAugmentation(0.5, 0, 10, 704, 256))) == 0
    assert empty.visible(64, 96).shape == (0,)


@settings(max_examples=40, deadline=None)
@given(angle=st.floats(-0.5, 0.5), scale=st.floats(0.9, 1.1), seed=st.integers(0, 100))
def test_the_world_turns_under_the_cameras_without_moving_pixels(angle, scale, seed) -> None:
    before = random_frame(seed)
    after = transform_world(copy.deepcopy(before), angle, scale)
    for key in ("gravity_center", "corners"):
        old, new = (getattr(frame["gt_bboxes_3d"], key).reshape(-1, 3).numpy() for frame in (before, after))
        for camera in range(6):
            pixels, depth = project(before["lidar2img"][camera], old)
            moved, moved_depth = project(after["lidar2img"][camera], new)
            valid = np.abs(depth) > 0.5
            np.testing.assert_allclose(moved[valid], pixels[valid], rtol=1e-4, atol=0.1)
            np.testing.assert_allclose(moved_depth, depth, rtol=1e-4, atol=1e-3)
        world_old = np.pad(old, ((0, 0), (0, 1)), constant_values=1) @ before["ego_pose"].T
        world_new = np.pad(new, ((0, 0), (0, 1)), constant_values=1) @ after["ego_pose"].T
        np.testing.assert_allclose(world_new[:, :3], world_old[:, :3], rtol=1e-5, atol=1e-2)
    identity = after["ego_pose_inv"].astype(np.float64) @ after["ego_pose"]
    np.testing.assert_allclose(identity, np.eye(4), atol=1e-3)
    np.testing.assert_allclose(after["lidar2img"], after["intrinsics"] @ after["extrinsics"], rtol=1e-9)


@settings(max_examples=30, deadline=None)
@given(angle=st.floats(-0.5, 0.5), scale=st.floats(0.9, 1.1))
def test_velocities_and_sizes_turn_and_scale_like_the_world(angle, scale) -> None:
    before = random_frame(0)
    after = transform_world(copy.deepcopy(before), angle, scale)["gt_bboxes_3d"].tensor.numpy()
    old = before["gt_bboxes_3d"].tensor.numpy()
    cos, sin = np.cos(angle), np.sin(angle)
    turn = scale * np.array([[cos, sin], [-sin, cos]])
    np.testing.assert_allclose(after[:, 7:9], old[:, 7:9] @ turn.T, atol=1e-4)
    np.testing.assert_allclose(after[:, 3:6], old[:, 3:6] * scale, rtol=1e-5)
    heading = np.stack([np.cos(after[:, 6]), np.sin(after[:, 6])], 1)
    expected = np.stack([np.cos(old[:, 6]), np.sin(old[:, 6])], 1) @ (turn / scale).T
    np.testing.assert_allclose(heading, expected, atol=1e-5)


def test_random_draws_stay_in_the_official_ranges() -> None:
    random.seed(0)
    transform = RandomResizeCropFlip((256, 704), (0.38, 0.55))
    draws = [transform.draw(1600, 900) for _ in range(300)]
    assert {draw.flip for draw in draws} == {True, False}
    for draw in draws:
        width, height = int(1600 * draw.scale), int(900 * draw.scale)
        assert 0.38 <= draw.scale <= 0.55
        assert 0 <= draw.crop_left <= max(0, width - 704)
        assert draw.crop_top == height - 256
        assert (draw.width, draw.height) == (704, 256)
    assert max(draw.crop_left for draw in draws) > 100


def test_one_draw_serves_all_cameras_of_a_frame() -> None:
    frame = random_frame(1)
    before = frame["intrinsics"].copy()
    frame["img"] = [np.zeros((900, 1600, 3), np.uint8)] * 6
    frame["image_objects"] = objects_of([[100, 400, 900, 800]] * 2, camera=[0, 5])
    random.seed(3)
    after = RandomResizeCropFlip((256, 704), (0.38, 0.55))(frame)
    maps = after["intrinsics"] @ np.linalg.inv(before)
    np.testing.assert_allclose(maps, np.broadcast_to(maps[0], maps.shape), atol=1e-9)
    objects = after["image_objects"]
    np.testing.assert_array_equal(objects.bboxes[0], objects.bboxes[1])
    assert all(image.shape == (256, 704, 3) for image in after["img"])


def test_consecutive_frames_draw_different_worlds() -> None:
    random.seed(0)
    transform = RandomRotateScaleWorld()
    first, second = (transform(random_frame(0))["lidar2img"] for _ in range(2))
    assert np.abs(first - second).max() > 1e-3


def instance(bbox, label=0, depth=10.0) -> dict:
    return {"bbox": bbox, "bbox_label": label, "center_2d": [bbox[0], bbox[1]], "depth": depth}


def test_loading_drops_what_the_official_converter_drops() -> None:
    record = {
        "ori_shape": (900, 1600),
        "cam_instances": {
            CAMERAS[2]: [instance([10, 10, 60, 80]), instance([10, 10, 10.5, 80]), instance([-50, 10, 0, 80]),
                         instance([10, 10, 60, 80], depth=-1.0), instance([10, 10, 60, 80], label=-1)],
            CAMERAS[0]: [instance([20, 20, 60, 80], label=7)],
        },
    }  # fmt: skip
    objects = LoadImageObjects()(dict(record))["image_objects"]
    assert objects.labels.tolist() == [7, 0]
    assert objects.camera.tolist() == [0, 2]
    assert objects.bboxes.tolist() == [[20, 20, 60, 80], [10, 10, 60, 80]]
    assert LoadImageObjects(classes=["car"])(dict(record))["image_objects"].labels.tolist() == [0]


def test_missing_2d_ground_truth_and_unknown_classes_are_named() -> None:
    with pytest.raises(FileFormatError, match="frame abc has no cam_instances"):
        LoadImageObjects()({"token": "abc", "ori_shape": (900, 1600)})
    with pytest.raises(MdpError, match="unknown names \\['lorry'\\]"):
        LoadImageObjects(classes=["lorry"])
    with pytest.raises(MdpError, match="resize_range"):
        RandomResizeCropFlip((256, 704), (0.5, 0.4))
