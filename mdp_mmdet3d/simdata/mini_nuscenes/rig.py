"""The sensors on the vehicle: six cameras and a spinning lidar, mounted as on a nuScenes car."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mdp_mmdet3d.datasets.conventions import CAMERAS, LIDAR
from mdp_mmdet3d.simdata.mini_nuscenes.geometry import rotation_matrix
from mdp_mmdet3d.simdata.mini_nuscenes.spec import FULL_IMAGE_SIZE

# yaw (degrees), x, y, z (metres), focal length, principal point (pixels at 1600x900), time before the lidar (us)
_CAMERA_MOUNTS: dict[str, tuple[float, float, float, float, float, float, float, int]] = {
    "CAM_FRONT": (0.3, 1.70, 0.016, 1.51, 1266.4, 816.3, 491.5, 35500),
    "CAM_FRONT_RIGHT": (-56.4, 1.55, -0.49, 1.50, 1260.8, 808.0, 495.3, 27600),
    "CAM_FRONT_LEFT": (55.2, 1.52, 0.49, 1.51, 1272.6, 826.6, 479.8, 43100),
    "CAM_BACK": (179.8, 0.03, 0.003, 1.58, 809.2, 829.2, 481.8, 10400),
    "CAM_BACK_LEFT": (108.6, 1.04, 0.48, 1.59, 1256.7, 792.1, 492.8, 500),
    "CAM_BACK_RIGHT": (-110.8, 1.01, -0.48, 1.56, 1259.5, 807.3, 501.2, 20000),
}
_LIDAR_MOUNT = (-90.0, 0.94, 0.0, 1.84)


@dataclass(frozen=True)
class Camera:
    """A calibrated camera (z ahead, x right, y down).

    Attributes:
        name: Channel.
        cam2ego: (4, 4).
        intrinsics: (3, 3) pixels.
        image_size: (width, height) pixels.
        lead_us: Microseconds by which it fires before the lidar.
    """

    name: str
    cam2ego: NDArray[np.float64]
    intrinsics: NDArray[np.float64]
    image_size: tuple[int, int]
    lead_us: int


@dataclass(frozen=True)
class Rig:
    """The calibrated sensors of one drive.

    Attributes:
        cameras: In the order of the data set's conventions.
        lidar2ego: (4, 4); the lidar's x axis points to the right of the car, its y axis ahead.
    """

    cameras: tuple[Camera, ...]
    lidar2ego: NDArray[np.float64]

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of all sensors."""
        return (*(camera.name for camera in self.cameras), LIDAR)


def make_rig(rng: np.random.Generator, image_size: tuple[int, int]) -> Rig:
    """Mount the sensors; every drive is calibrated a little differently.

    Args:
        rng: Source of the differences.
        image_size: (width, height); the focal length scales with the width, rows are lost at the top.
    """
    width, height = image_size
    scale = width / FULL_IMAGE_SIZE[0]
    lost_rows = FULL_IMAGE_SIZE[1] * scale - height
    cameras = []
    for name in CAMERAS:
        yaw, x, y, z, focal, cx, cy, lead_us = _CAMERA_MOUNTS[name]
        tilt = rng.normal(0, 0.3, 3)
        pose = np.eye(4)
        pose[:3, :3] = rotation_matrix(*np.radians([yaw + tilt[0], tilt[1], tilt[2]])) @ _OPTICAL
        pose[:3, 3] = np.array([x, y, z]) + rng.normal(0, 0.005, 3)
        focal_px, cx, cy = np.array([focal, cx, cy]) * scale + rng.normal(0, 2, 3) * scale
        intrinsics = np.array([[focal_px, 0, cx], [0, focal_px, cy - lost_rows], [0, 0, 1]])
        cameras.append(Camera(name, pose, intrinsics, image_size, lead_us))
    lidar2ego = np.eye(4)
    lidar2ego[:3, :3] = rotation_matrix(*np.radians(np.array([_LIDAR_MOUNT[0], 0.0, 0.0]) + rng.normal(0, 0.3, 3)))
    lidar2ego[:3, 3] = np.array(_LIDAR_MOUNT[1:]) + rng.normal(0, 0.005, 3)
    return Rig(tuple(cameras), lidar2ego)


_OPTICAL = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
"""Optical axes (right, down, ahead) in vehicle axes (ahead, left, up)."""
