"""From a record of `StreamNuScenesDataset` to the network's input: images, camera matrices, poses, ground truth.

Matrices are float64 until packing. One image augmentation serves all cameras of a frame. Normalisation and padding
belong to the data preprocessor of the model. Source: StreamPETR, arXiv 2303.11926, and its configuration r50_704.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet3d.datasets.transforms import Pack3DDetInputs
from mmdet3d.registry import TRANSFORMS
from mmengine.structures import InstanceData
from numpy.typing import NDArray
from PIL import Image

from mdp_mmdet3d.datasets.conventions import CAMERAS
from mdp_mmdet3d.errors import FileFormatError, MissingDatasetError
from mdp_mmdet3d.runtime import images

MATRIX_KEYS = ("intrinsics", "extrinsics", "lidar2img", "ego_pose", "ego_pose_inv")


@dataclass(frozen=True)
class ImageAugmentation:
    """Resize, crop and optional mirror of an image, in this order.

    Attributes:
        scale: Factor of the resize; the resized image is (int(W scale), int(H scale)).
        crop_left: First column of the crop in the resized image; may be negative.
        crop_top: First row of the crop in the resized image; may be negative.
        width: Columns of the result.
        height: Rows of the result.
        flip: Whether the result is mirrored left to right.
    """

    scale: float
    crop_left: int
    crop_top: int
    width: int
    height: int
    flip: bool = False

    def apply(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Augment an (H, W, 3) uint8 image; parts of the crop outside the resized image are black.

        The filter is PIL's bicubic with antialiasing, on which the published weights were trained.
        """
        resized = Image.fromarray(image).resize(
            scaled_size(image.shape[1], image.shape[0], self.scale), Image.Resampling.BICUBIC
        )
        box = (self.crop_left, self.crop_top, self.crop_left + self.width, self.crop_top + self.height)
        result = np.asarray(resized.crop(box))
        return np.ascontiguousarray(result[:, ::-1] if self.flip else result)

    @property
    def matrix(self) -> NDArray[np.float64]:
        """(4, 4) matrix A that maps original to augmented homogeneous pixels: ``intrinsics' = A @ intrinsics``."""
        matrix = np.diag([self.scale, self.scale, 1.0, 1.0])
        matrix[0, 2], matrix[1, 2] = -self.crop_left, -self.crop_top
        if self.flip:
            matrix = np.array([[-1.0, 0, self.width, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ matrix
        return matrix


def scaled_size(width: int, height: int, scale: float) -> tuple[int, int]:
    """(width, height) after a resize, truncated to whole pixels as the official code does."""
    # 176.0 may arrive as 175.99999999999997; truncation must not lose a pixel to rounding.
    return int(round(width * scale, 6)), int(round(height * scale, 6))


def evaluation_augmentation(width: int, height: int, final_shape: tuple[int, int]) -> ImageAugmentation:
    """The fixed augmentation of evaluation: smallest covering resize, bottom-aligned and centred crop.

    Args:
        width: Columns of the camera image.
        height: Rows of the camera image.
        final_shape: (rows, columns) of the network's input, e.g. (256, 704).
    """
    rows, columns = final_shape
    scale = max(rows / height, columns / width)
    resized_width, resized_height = scaled_size(width, height, scale)
    return ImageAugmentation(
        scale=scale,
        crop_left=max(0, resized_width - columns) // 2,
        crop_top=resized_height - rows,
        width=columns,
        height=rows,
    )


@TRANSFORMS.register_module()
class LoadStreamImages(BaseTransform):
    """Read the six images of a frame in StreamPETR's camera order, whatever the order in the info file.

    Added keys: ``img`` (list of N (H, W, 3) uint8 BGR), ``intrinsics`` and ``extrinsics`` ((N, 4, 4) float64, camera
    to pixel and lidar to camera), ``lidar2img``, ``img_timestamp`` ((N,) float64 seconds), ``ori_shape``,
    ``img_shape``, ``num_views``.

    Args:
        cameras: Camera names in the order of the output.

    Raises:
        MissingDatasetError: An image is not there.
        FileFormatError: A camera is missing in the record, a file is no image, or sizes differ between cameras.
    """

    def __init__(self, cameras: Sequence[str] = CAMERAS) -> None:
        self.cameras = tuple(cameras)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Load the images and collect the matrices of one frame."""
        missing = [camera for camera in self.cameras if camera not in results["images"]]
        if missing:
            raise FileFormatError(f"frame {results.get('token')} has no {', '.join(missing)}; all are needed")
        records = [results["images"][camera] for camera in self.cameras]
        loaded = [read_image(record["img_path"]) for record in records]
        shapes = {image.shape for image in loaded}
        if len(shapes) > 1:
            raise FileFormatError(f"images of frame {results.get('token')} differ in size: {sorted(shapes)}")
        results["img"] = loaded
        results["img_path"] = [record["img_path"] for record in records]
        results["intrinsics"] = np.stack([_padded(record["cam2img"]) for record in records])
        results["extrinsics"] = np.stack([np.asarray(record["lidar2cam"], np.float64) for record in records])
        results["img_timestamp"] = np.array([record["timestamp"] for record in records], np.float64)
        results["ori_shape"] = results["img_shape"] = results["pad_shape"] = loaded[0].shape[:2]
        results["num_views"] = len(loaded)
        return update_lidar2img(results)


@TRANSFORMS.register_module()
class ResizeCropImages(BaseTransform):
    """Bring all images of a frame to the network's size with the fixed augmentation of evaluation.

    Args:
        final_shape: (rows, columns) of the network's input.
    """

    def __init__(self, final_shape: tuple[int, int]) -> None:
        self.final_shape = (int(final_shape[0]), int(final_shape[1]))

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Augment the images and carry the change into the matrices."""
        height, width = results["img"][0].shape[:2]
        return augment_frame(results, evaluation_augmentation(width, height, self.final_shape))


@TRANSFORMS.register_module()
class PackStreamInputs(Pack3DDetInputs):
    """Pack a frame for the detector.

    The images go to ``inputs['img']`` ((N, 3, H, W) uint8), everything else into the data sample: matrices as float32
    arrays, ``timestamp`` as a Python float (float32 has a resolution of 128 s at today's epoch).

    Of 2D ground truth (``image_objects``) the sample gets ``gt_instances`` with ``bboxes``, ``labels``, ``centers_2d``,
    ``depths`` and ``camera``, over all cameras.

    Args:
        keys: What to pack; ground truth is packed where the data set loads it.
    """

    META_KEYS = (
        *MATRIX_KEYS,
        "timestamp",
        "img_timestamp",
        "prev_exists",
        "scene_token",
        "token",
        "sample_idx",
        "img_path",
        "ori_shape",
        "img_shape",
        "pad_shape",
        "num_views",
        "box_type_3d",
        "box_mode_3d",
    )

    def __init__(self, keys: Sequence[str] = ("img", "gt_bboxes_3d", "gt_labels_3d")) -> None:
        super().__init__(keys=tuple(keys), meta_keys=self.META_KEYS)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Cast the matrices and pack."""
        for key in MATRIX_KEYS:
            results[key] = np.asarray(results[key], np.float32)
        results["timestamp"] = float(results["timestamp"])
        results["prev_exists"] = bool(results["prev_exists"])
        packed = super().transform(results)
        if "image_objects" in results:
            objects = vars(results["image_objects"])
            packed["data_samples"].gt_instances = InstanceData(
                **{name: torch.from_numpy(values) for name, values in objects.items()}
            )
        return packed


def augment_frame(results: dict[str, Any], augmentation: ImageAugmentation) -> dict[str, Any]:
    """Apply one augmentation to all images of a frame and to their intrinsics."""
    results["img"] = [augmentation.apply(image) for image in results["img"]]
    results["intrinsics"] = augmentation.matrix @ results["intrinsics"]
    results["img_shape"] = results["pad_shape"] = (augmentation.height, augmentation.width)
    return update_lidar2img(results)


def update_lidar2img(results: dict[str, Any]) -> dict[str, Any]:
    """Recompute ``lidar2img`` after a change of intrinsics or extrinsics."""
    results["lidar2img"] = results["intrinsics"] @ results["extrinsics"]
    return results


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """Read a colour image as (H, W, 3) uint8 in BGR order, with the reader of the deployed runtime."""
    try:
        return np.ascontiguousarray(images.read_image(path)[..., ::-1])
    except FileNotFoundError as error:
        raise MissingDatasetError(
            f"image {path} does not exist although the info file names it; is the data set complete?"
        ) from error


def _padded(intrinsics: Sequence) -> NDArray[np.float64]:
    """Camera matrix (3, 3) as (4, 4)."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.asarray(intrinsics, np.float64)[:3, :3]
    return matrix
