"""Training transforms: 2D ground truth, random image augmentation in step with it, random rotation of the world.

Every draw is one per frame; consecutive frames of a stream differ and their poses carry the difference (StreamPETR,
arXiv 2303.11926, and its configuration r50_704).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet3d.registry import TRANSFORMS
from numpy.typing import NDArray

from mdp_mmdet3d.datasets.conventions import CAMERAS, INFO_CLASSES
from mdp_mmdet3d.errors import FileFormatError, MdpError

from .transforms import ImageAugmentation, augment_frame, scaled_size, update_lidar2img

MIN_SIDE_PX = 2.0


@dataclass(frozen=True)
class ImageObjects:
    """What the cameras of a frame see, in pixels of the current images.

    Attributes:
        bboxes: (m, 4) float32 corners (x1, y1, x2, y2).
        labels: (m,) int64 class indices in the order of the info files.
        centers_2d: (m, 2) float32 projected centres of the 3D boxes.
        depths: (m,) float32 metres along the optical axis.
        camera: (m,) int64 position of the camera.
    """

    bboxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    centers_2d: NDArray[np.float32]
    depths: NDArray[np.float32]
    camera: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: NDArray) -> ImageObjects:
        """The objects at ``index``, a mask or positions."""
        return ImageObjects(*(getattr(self, field.name)[index] for field in fields(self)))

    def augmented(self, augmentation: ImageAugmentation) -> ImageObjects:
        """The objects after an image augmentation; those with a side below ``MIN_SIDE_PX`` are left out."""
        shift = np.array([augmentation.crop_left, augmentation.crop_top], np.float32)
        limit = np.array([augmentation.width, augmentation.height], np.float32)
        scale = np.float32(augmentation.scale)
        bboxes = np.clip(self.bboxes * scale - np.tile(shift, 2), 0, np.tile(limit, 2))
        centers = np.clip(self.centers_2d * scale - shift, 0, limit)
        large = (bboxes[:, 2:] - bboxes[:, :2] >= MIN_SIDE_PX).all(axis=1)
        if augmentation.flip:
            bboxes[:, [0, 2]] = augmentation.width - bboxes[:, [2, 0]]
            centers[:, 0] = augmentation.width - centers[:, 0]
        moved = ImageObjects(bboxes, self.labels, centers, self.depths, self.camera)
        return moved.select(large)

    def visible(self, height: int, width: int) -> NDArray[np.bool_]:
        """Which objects are not hidden behind nearer ones, judged by rectangles.

        Per camera, rectangles are painted far to near; an object is kept if a pixel of it survives. The farthest one
        of each camera also survives where background is left, as in the official training.

        Args:
            height: Rows of the images.
            width: Columns of the images.
        """
        keep = np.zeros(len(self), bool)
        for camera in np.unique(self.camera):
            own = np.flatnonzero(self.camera == camera)
            own = own[np.argsort(-self.depths[own], kind="stable")]
            canvas = np.zeros((height, width), np.int64)
            for rank, index in enumerate(own):
                x1, y1 = np.ceil(self.bboxes[index, :2]).astype(int)
                x2, y2 = np.floor(self.bboxes[index, 2:]).astype(int)
                canvas[y1:y2, x1:x2] = rank
            keep[own[np.unique(canvas)]] = True
        return keep


@TRANSFORMS.register_module()
class LoadImageObjects(BaseTransform):
    """Collect the 2D ground truth of a frame from ``cam_instances`` into ``image_objects``.

    Boxes with a side below one pixel or without overlap with the image, and centres behind the camera, are left out;
    MMDetection3D's converter keeps them, the official one did not. Use it after ``LoadStreamImages``.

    Args:
        classes: Classes to keep, the names of the info files; all by default.
        cameras: Camera names in the order of the images.

    Raises:
        FileFormatError: The info file has no 2D ground truth.
    """

    def __init__(self, classes: Sequence[str] = INFO_CLASSES, cameras: Sequence[str] = CAMERAS) -> None:
        unknown = sorted(set(classes) - set(INFO_CLASSES))
        if unknown:
            raise MdpError(f"LoadImageObjects.classes has unknown names {unknown}; known: {', '.join(INFO_CLASSES)}")
        self.labels = {INFO_CLASSES.index(name) for name in classes}
        self.cameras = tuple(cameras)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Add ``image_objects``."""
        if "cam_instances" not in results:
            raise FileFormatError(
                f"frame {results.get('token')} has no cam_instances (2D ground truth), which the auxiliary head needs; "
                "make the info files with `python tools/create_infos.py DATAROOT`, or train with img_roi_head=None"
            )
        height, width = results["ori_shape"]
        rows = [
            (instance, camera)
            for camera, name in enumerate(self.cameras)
            for instance in results["cam_instances"].get(name, ())
            if instance["bbox_label"] in self.labels and instance["depth"] > 0
        ]
        objects = ImageObjects(
            bboxes=np.array([row["bbox"] for row, _ in rows], np.float32).reshape(-1, 4),
            labels=np.array([row["bbox_label"] for row, _ in rows], np.int64),
            centers_2d=np.array([row["center_2d"] for row, _ in rows], np.float32).reshape(-1, 2),
            depths=np.array([row["depth"] for row, _ in rows], np.float32),
            camera=np.array([camera for _, camera in rows], np.int64),
        )
        inside = np.minimum(objects.bboxes[:, 2:], (width, height)) - np.maximum(objects.bboxes[:, :2], 0)
        sides = objects.bboxes[:, 2:] - objects.bboxes[:, :2]
        results["image_objects"] = objects.select((inside > 0).all(axis=1) & (sides >= 1).all(axis=1))
        return results


@TRANSFORMS.register_module()
class RandomResizeCropFlip(BaseTransform):
    """Random resize, bottom-aligned crop and mirror of all images of a frame, with matrices and 2D ground truth.

    Args:
        final_shape: (rows, columns) of the network's input.
        resize_range: Smallest and largest factor.
        flip_prob: Probability of the mirror.
        filter_invisible: Leave out 2D objects hidden behind nearer ones.
    """

    def __init__(
        self,
        final_shape: tuple[int, int],
        resize_range: tuple[float, float],
        flip_prob: float = 0.5,
        filter_invisible: bool = True,
    ) -> None:
        if not 0 < resize_range[0] <= resize_range[1]:
            raise MdpError(f"resize_range={resize_range} must be (smallest, largest) factor, both positive")
        self.final_shape = (int(final_shape[0]), int(final_shape[1]))
        self.resize_range = resize_range
        self.flip_prob = flip_prob
        self.filter_invisible = filter_invisible

    def draw(self, width: int, height: int) -> ImageAugmentation:
        """A random augmentation of images of this size."""
        rows, columns = self.final_shape
        scale = random.uniform(*self.resize_range)
        resized_width, resized_height = scaled_size(width, height, scale)
        return ImageAugmentation(
            scale=scale,
            crop_left=int(random.uniform(0, max(0, resized_width - columns))),
            crop_top=resized_height - rows,
            width=columns,
            height=rows,
            flip=random.random() < self.flip_prob,
        )

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Draw once and apply to all cameras."""
        height, width = results["ori_shape"]
        augmentation = self.draw(width, height)
        if "image_objects" in results:
            objects = results["image_objects"].augmented(augmentation)
            if self.filter_invisible:
                objects = objects.select(objects.visible(*self.final_shape))
            results["image_objects"] = objects
        return augment_frame(results, augmentation)


@TRANSFORMS.register_module()
class RandomRotateScaleWorld(BaseTransform):
    """Rotate the lidar frame about its z axis and scale it, with boxes, velocities, matrices and poses.

    Args:
        rotation_rad: Smallest and largest angle.
        scale_range: Smallest and largest factor.
    """

    def __init__(
        self,
        rotation_rad: tuple[float, float] = (-0.3925, 0.3925),
        scale_range: tuple[float, float] = (0.95, 1.05),
    ) -> None:
        self.rotation_rad = rotation_rad
        self.scale_range = scale_range

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Draw once per frame."""
        return transform_world(results, random.uniform(*self.rotation_rad), random.uniform(*self.scale_range))


def transform_world(results: dict[str, Any], angle_rad: float, scale: float) -> dict[str, Any]:
    """Apply the map x' = S R(-angle) x of the lidar frame to everything that is expressed in it.

    Afterwards ``ego_pose`` is the global-from-lidar transform of the new frame, so that the memory of a stream stays
    consistent although every frame draws its own map.
    """
    cos, sin = np.cos(angle_rad), np.sin(angle_rad)
    matrix = np.diag([scale, scale, scale, 1.0])
    matrix[:2, :2] = scale * np.array([[cos, sin], [-sin, cos]])
    inverse = np.linalg.inv(matrix)
    results["extrinsics"] = results["extrinsics"] @ inverse
    results["ego_pose"] = results["ego_pose"] @ inverse
    results["ego_pose_inv"] = matrix @ results["ego_pose_inv"]
    if "gt_bboxes_3d" in results:
        results["gt_bboxes_3d"].rotate(-angle_rad)
        results["gt_bboxes_3d"].scale(scale)
    return update_lidar2img(results)
