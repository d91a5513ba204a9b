"""From camera images to network inputs, as the manifest says; numpy and Pillow only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.plausible import intrinsics_fault, pose_fault
from mdp_mmdet3d.runtime.manifest import DeploymentManifest, ImageTransform
from mdp_mmdet3d.runtime.stream import Frame


@dataclass(frozen=True)
class CameraFrame:
    """One moment of all cameras as they deliver it.

    Attributes:
        images: Camera name -> (H, W, 3) uint8 RGB of the manifest's ``source_size``.
        intrinsics: Camera name -> (3, 3) or padded to (4, 4), of the original image.
        lidar2cam: Camera name -> (4, 4) camera <- lidar (on a vehicle: base link).
        ego_pose: (4, 4) float64, global <- lidar.
        timestamp: Seconds; strictly increasing inside a scene.
        scene_token: The memory is reset when it changes.
        prev_exists: False resets the memory although the scene goes on.
    """

    images: Mapping[str, np.ndarray]
    intrinsics: Mapping[str, np.ndarray]
    lidar2cam: Mapping[str, np.ndarray]
    ego_pose: np.ndarray
    timestamp: float
    scene_token: str = ""
    prev_exists: bool = True


def preprocess(camera_frame: CameraFrame, manifest: DeploymentManifest) -> Frame:
    """Resize, crop and normalise the images and move the camera matrices along; cameras in the manifest's order.

    Raises:
        DeploymentError: A camera is missing or unknown, an image has another size or type, or a matrix is none of a
            camera.
    """
    names = manifest.camera_names
    for what in ("images", "intrinsics", "lidar2cam"):
        found = getattr(camera_frame, what).keys()
        if set(found) != set(names):
            raise DeploymentError(
                f"{what} of the frame at {camera_frame.timestamp!r} s: missing {sorted(set(names) - set(found))}, "
                f"unknown {sorted(set(found) - set(names))}; the model needs exactly {list(names)}; drop the frame"
            )
    for what, check in (("intrinsics", intrinsics_fault), ("lidar2cam", pose_fault)):
        for name in names:
            if (fault := check(getattr(camera_frame, what)[name])) is not None:
                raise DeploymentError(
                    f"{what} of {name} at {camera_frame.timestamp!r} s: {fault}; check the calibration"
                )
    adjust = image_matrix(manifest.image)
    intrinsics = np.stack([adjust @ _padded(camera_frame.intrinsics[name]) for name in names])
    lidar2cam = np.stack([np.asarray(camera_frame.lidar2cam[name], np.float64) for name in names])
    return Frame(
        img=np.stack([network_image(camera_frame.images[name], manifest.image, name) for name in names]),
        ego_pose=camera_frame.ego_pose,
        timestamp=camera_frame.timestamp,
        intrinsics=intrinsics,
        lidar2img=intrinsics @ lidar2cam,
        scene_token=camera_frame.scene_token,
        prev_exists=camera_frame.prev_exists,
    )


def network_image(image: np.ndarray, transform: ImageTransform, camera: str = "camera") -> np.ndarray:
    """One image as the engine takes it.

    Args:
        image: (H, W, 3) uint8 RGB.
        transform: The manifest's.
        camera: Its name, for errors.

    Returns:
        (3, h, w) float32, normalised, channels in the manifest's order.

    Raises:
        DeploymentError: Shape or dtype differ from ``transform.source_size``, or the filter is not known.
    """
    expected = (*transform.source_size, 3)
    if image.dtype != np.uint8 or image.shape != expected:
        raise DeploymentError(f"image of {camera} is {image.dtype}{list(image.shape)}, expected uint8{list(expected)}")
    if transform.interpolation != "pil_bicubic":
        raise DeploymentError(f"resize filter {transform.interpolation!r} is not known; this release has pil_bicubic")
    height, width = transform.resized_size
    top, left = transform.crop_offset
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    crop = np.asarray(resized.crop((left, top, left + transform.size[1], top + transform.size[0])), np.float32)
    if transform.channel_order == "BGR":
        crop = crop[..., ::-1]
    normalised = (crop - np.asarray(transform.mean, np.float32)) / np.asarray(transform.std, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def image_matrix(transform: ImageTransform) -> np.ndarray:
    """(4, 4) network pixel <- camera pixel."""
    scale = max(size / source for size, source in zip(transform.size, transform.source_size))
    matrix = np.diag([scale, scale, 1.0, 1.0])
    matrix[0, 2], matrix[1, 2] = -transform.crop_offset[1], -transform.crop_offset[0]
    return matrix


def _padded(intrinsics: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    size = len(intrinsics)
    matrix[:size, :size] = intrinsics
    return matrix
