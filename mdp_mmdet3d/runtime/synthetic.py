"""Frames made up for timing: noise seen by a ring of cameras on a car that drives straight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mdp_mmdet3d.runtime.graph_manifest import GraphManifest
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.runtime.stream import Frame

FRAME_INTERVAL_S = 0.5
SPEED_M_PER_S = 8.0


def synthetic_frames(manifest: DeploymentManifest, count: int, seed: int = 0) -> list[Frame]:
    """``count`` frames of one scene with the shapes that ``manifest`` asks for.

    The work of the engines does not depend on what the images show; the boxes mean nothing.

    Args:
        manifest: Of the deployment that is to run them.
        count: Number of frames.
        seed: Of the noise.
    """
    rng = np.random.default_rng(seed)
    height, width = manifest.image.size
    num_cams = len(manifest.camera_names)
    camera = np.diag([0.8 * width, 0.8 * width, 1.0, 1.0])
    camera[:2, 2] = width / 2, height / 2
    lidar2cam = np.stack([_lidar_to_camera(2 * np.pi * index / num_cams) for index in range(num_cams)])
    frames = []
    for index in range(count):
        pose = np.eye(4)
        pose[1, 3] = SPEED_M_PER_S * FRAME_INTERVAL_S * index
        frames.append(
            Frame(
                img=rng.standard_normal((num_cams, 3, height, width), dtype=np.float32),
                ego_pose=pose,
                timestamp=FRAME_INTERVAL_S * index,
                intrinsics=np.tile(camera, (num_cams, 1, 1)),
                lidar2img=camera @ lidar2cam,
                scene_token="synthetic",
            )
        )
    return frames


def synthetic_images(manifest: GraphManifest, count: int, seed: int = 0) -> list[np.ndarray]:
    """``count`` images of noise for a single graph."""
    rng = np.random.default_rng(seed)
    shape = manifest.engines["model"].inputs[0].shape
    return [rng.standard_normal(shape, dtype=np.float32) for _ in range(count)]


def repeat_frames(frames: Sequence[Any]) -> Iterator[Any]:
    """Endless stream: every pass over ``frames`` is a scene of its own; images of a single graph have no scene."""
    index = 0
    while frames:
        yield from (
            frames
            if not isinstance(frames[0], Frame)
            else (replace(frame, scene_token=f"{frame.scene_token}#{index}") for frame in frames)
        )
        index += 1


def _lidar_to_camera(yaw: float) -> np.ndarray:
    """Camera at the lidar, looking along the direction ``yaw`` left of straight ahead (lidar y)."""
    sine, cosine = np.sin(yaw), np.cos(yaw)
    matrix = np.eye(4)
    matrix[:3, :3] = [[cosine, sine, 0], [0, 0, -1], [-sine, cosine, 0]]
    return matrix
