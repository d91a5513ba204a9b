"""Images, matrices and boxes change together."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("mmcv", reason="mmcv is needed by mmdet3d")

from projects.streampetr.transforms import (
    ImageAugmentation,
    LoadStreamImages,
    PackStreamInputs,
    ResizeCropImages,
    augment_frame,
    evaluation_augmentation,
)

augmentations = st.builds(
    ImageAugmentation,
    scale=st.floats(0.3, 0.7),
    crop_left=st.integers(-20, 150),
    crop_top=st.integers(0, 200),
    width=st.just(704),
    height=st.just(256),
    flip=st.booleans(),
)


def frame_of(images, rng):
    intrinsics = np.tile(np.eye(4), (len(images), 1, 1))
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = rng.uniform(800, 1300, len(images))
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = 810, 490
    extrinsics = np.tile(np.eye(4), (len(images), 1, 1))
    for matrix in extrinsics:
        matrix[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        matrix[:3, 3] = rng.normal(size=3)
    return {"img": images, "intrinsics": intrinsics, "extrinsics": extrinsics, "lidar2img": intrinsics @ extrinsics}


def project(matrix, points):
    pixels = np.pad(points, ((0, 0), (0, 1)), constant_values=1) @ matrix.T
    return pixels[:, :2] / pixels[:, 2:3]


@settings(max_examples=40, deadline=None)
@given(augmentation=augmentations, seed=st.integers(0, 100))
def test_projecting_with_new_matrices_is_augmenting_the_projected_pixel(augmentation, seed):
    rng = np.random.default_rng(seed)
    frame = frame_of([np.zeros((9, 16, 3), np.uint8)] * 2, rng)
    before = frame["lidar2img"].copy()
    points = rng.normal(size=(20, 3)) * 20
    result = augment_frame(frame, augmentation)
    for old, new in zip(before, result["lidar2img"]):
        u, v = project(old, points).T
        u, v = u * augmentation.scale - augmentation.crop_left, v * augmentation.scale - augmentation.crop_top
        if augmentation.flip:
            u = augmentation.width - u
        np.testing.assert_allclose(project(new, points), np.stack([u, v], 1), rtol=1e-9, atol=1e-6)
    assert (np.sign(result["intrinsics"][:, 0, 0]) == (-1 if augmentation.flip else 1)).all()


@pytest.mark.parametrize(
    ("final_shape", "scale", "resized", "rows"),
    [((256, 704), 0.44, (704, 396), (140, 396)), ((320, 800), 0.5, (800, 450), (130, 450))],
)
def test_evaluation_sizes_are_those_of_the_specification(final_shape, scale, resized, rows):
    found = evaluation_augmentation(1600, 900, final_shape)
    assert found == ImageAugmentation(scale, 0, rows[0], final_shape[1], final_shape[0])
    image = np.random.default_rng(0).integers(0, 256, (900, 1600, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).resize(resized, Image.Resampling.BICUBIC))[rows[0] : rows[1]]
    np.testing.assert_array_equal(found.apply(image), expected)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(64, 2000), height=st.integers(36, 1200), rows=st.integers(16, 512), columns=st.integers(16, 900)
)
def test_the_evaluation_crop_lies_inside_the_resized_image(width, height, rows, columns):
    found = evaluation_augmentation(width, height, (rows, columns))
    resized_width, resized_height = int(round(width * found.scale, 6)), int(round(height * found.scale, 6))
    assert resized_width >= columns
    assert resized_height >= rows
    assert 0 <= found.crop_left <= resized_width - columns
    assert found.crop_top + rows == resized_height


def test_crops_beyond_the_image_are_black_and_flips_mirror():
    image = np.full((90, 160, 3), 200, np.uint8)
    image[:, :80] = 50
    plain = ImageAugmentation(0.5, -10, 5, 100, 40).apply(image)
    assert plain.shape == (40, 100, 3)
    assert (plain[:, :10] == 0).all()
    assert (plain[:, 90:] == 0).all()
    assert plain[:, 15:40].mean() < 60
    np.testing.assert_array_equal(ImageAugmentation(0.5, -10, 5, 100, 40, True).apply(image), plain[:, ::-1])


def test_an_image_feature_moves_with_the_matrix():
    image = np.zeros((900, 1600, 3), np.uint8)
    cv2.circle(image, (1000, 600), 8, (255, 255, 255), -1)
    for flip in (False, True):
        augmentation = ImageAugmentation(0.5, 40, 100, 704, 256, flip)
        result = augmentation.apply(image)[..., 0].astype(float)
        v, u = (np.indices(result.shape) * result).sum((1, 2)) / result.sum()
        expected = augmentation.matrix @ [1000, 600, 1, 1]
        # Pixel centres against pixel corners: half a pixel at most, and a mirrored column index is W - 1 - u.
        np.testing.assert_allclose([u, v], expected[:2], atol=1.01)


@pytest.fixture
def record(tmp_path):
    images = {}
    order = ["CAM_BACK", "CAM_FRONT_LEFT", "CAM_FRONT", "CAM_BACK_RIGHT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT"]
    for value, camera in enumerate(order):
        path = tmp_path / f"{camera}.png"
        cv2.imwrite(str(path), np.full((90, 160, 3), 10 * value, np.uint8))
        images[camera] = {
            "img_path": str(path),
            "cam2img": [[100.0 + value, 0, 80], [0, 100.0 + value, 45], [0, 0, 1]],
            "lidar2cam": np.eye(4).tolist(),
            "timestamp": 1532402927.6 + value / 100,
        }
    return {
        "images": images,
        "timestamp": 1532402927.647951,
        "prev_exists": np.bool_(True),
        "scene_token": "s",
        "token": "t",
        "sample_idx": 0,
        "ego_pose": np.eye(4, dtype=np.float32),
        "ego_pose_inv": np.eye(4, dtype=np.float32),
    }


def test_cameras_are_put_in_order_with_their_own_matrices(record):
    loaded = LoadStreamImages().transform(record)
    assert [int(image[0, 0, 0]) for image in loaded["img"]] == [20, 40, 10, 0, 50, 30]
    np.testing.assert_allclose(loaded["intrinsics"][:, 0, 0], [102, 104, 101, 100, 105, 103])
    assert loaded["img_timestamp"].dtype == np.float64
    assert loaded["img_timestamp"][0] == 1532402927.6 + 0.02


def test_packing_keeps_times_exact_through_the_collation(record):
    from mmengine.dataset import pseudo_collate

    for transform in (LoadStreamImages(), ResizeCropImages((64, 160)), PackStreamInputs(["img"])):
        record = transform.transform(record)
    batch = pseudo_collate([record, record])
    for sample in batch["data_samples"]:
        assert sample.metainfo["timestamp"] == 1532402927.647951
        assert type(sample.metainfo["timestamp"]) is float
        assert sample.metainfo["prev_exists"] is True
    assert batch["inputs"]["img"][0].shape == (6, 3, 64, 160)
