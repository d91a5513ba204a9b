"""Ground, sky, light and the grain of the sensor."""
from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from mdp_mmdet3d.datasets.mini_nuscenes.ground import Ground
from mdp_mmdet3d.datasets.mini_nuscenes.rig import Camera

CLOUD_HEIGHT_M = 300.0
_CLOUD_TEXEL_M = 3.0
_DETAIL_TEXEL_M = 0.02
_GRAIN_SHIFT = 64


@dataclass(frozen=True)
class EmptyFrame:
    """Image of the empty world and its inverse depth (0 in the sky), (H, W, 3) uint8 and (H, W) float32."""

    image: NDArray[np.uint8]
    inverse_depth: NDArray[np.float32]


class Backdrop:
    """The weather and the ground of one scene.

    Attributes:
        sun: (3,) unit vector towards the sun, global frame.
        haze: BGR colour of the horizon.
    """

    def __init__(self, rng: np.random.Generator, ground: Ground) -> None:
        self._ground = ground
        azimuth, elevation = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(35, 65))
        self.sun = np.array(
            [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)]
        )
        self.haze = tuple((np.array([218, 208, 198]) * rng.uniform(0.88, 1.0)).tolist())
        self._zenith = np.array([205, 150, 100]) * rng.uniform(0.75, 1.05)
        self._clouds = _clouds(rng)
        self._detail = rng.normal(128, 14, (512, 512)).clip(0, 255).astype(np.uint8)
        self._grain: NDArray[np.int16] | None = None
        self._rng = rng

    def draw(self, camera: Camera, global2cam: NDArray[np.float64]) -> EmptyFrame:
        """Ground below the horizon, sky above it."""
        width, height = camera.image_size
        up = global2cam[:3, 2]
        rise = up @ np.linalg.inv(camera.intrinsics)
        u, v = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
        # Upward component of a pixel's ray at unit depth: negative where the ray meets the ground.
        elevation = (np.float32(rise[0]) * u)[None] + (np.float32(rise[1]) * v + np.float32(rise[2]))[:, None]
        camera_height = -float(up @ global2cam[:3, 3])
        inverse_depth = np.maximum(-elevation / np.float32(camera_height), 0)
        edge = -(rise[0] * np.array([0, width - 1]) + rise[2]) / rise[1]
        first, last = (int(np.clip(value, 0, height)) for value in (np.floor(edge.min()), np.ceil(edge.max()) + 1))
        image = np.empty((height, width, 3), np.uint8)
        plane = camera.intrinsics @ np.stack([global2cam[:3, 0], global2cam[:3, 1], global2cam[:3, 3]], 1)
        image[:last] = self._sky(camera, global2cam, elevation[:last])
        below = self._floor(plane, inverse_depth, camera, first)
        mixed = inverse_depth[first:last] > 0
        image[first:last][mixed] = below[: last - first][mixed]
        image[last:] = below[last - first :]
        return EmptyFrame(image, inverse_depth)

    def develop(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The image with the softness and the grain of a real sensor."""
        height, width = image.shape[:2]
        if width >= 800:
            image = cv2.GaussianBlur(image, (3, 3), 0.6)
        y, x = self._rng.integers(0, _GRAIN_SHIFT, 2).tolist()
        if self._grain is None or self._grain.shape[:2] != (height + _GRAIN_SHIFT, width + _GRAIN_SHIFT):
            shape = (height + _GRAIN_SHIFT, width + _GRAIN_SHIFT, 3)
            self._grain = self._rng.normal(0, 2.5, shape).astype(np.int16)
        return cv2.add(image, self._grain[y : y + height, x : x + width], dtype=cv2.CV_8U).astype(np.uint8)

    def _sky(self, camera: Camera, global2cam: NDArray, elevation: NDArray[np.float32]) -> NDArray[np.uint8]:
        rows, width = elevation.shape
        if rows == 0:
            return np.empty((0, width, 3), np.uint8)
        height = np.clip(elevation, 0, 1)
        shade = np.sqrt(height)[..., None]
        sky = np.float32(self.haze) * (1 - shade) + self._zenith.astype(np.float32) * shade
        ceiling = global2cam[:3, 3] + CLOUD_HEIGHT_M * global2cam[:3, 2]
        plane = camera.intrinsics @ np.stack([global2cam[:3, 0], global2cam[:3, 1], ceiling], 1)
        texel2world = np.diag([_CLOUD_TEXEL_M, _CLOUD_TEXEL_M, 1.0])
        cover = cv2.warpPerspective(self._clouds, plane @ texel2world, (width, rows), borderMode=cv2.BORDER_WRAP)
        cover = (cover.astype(np.float32) / 255 * np.clip(height * 5 - 0.3, 0, 1))[..., None]
        return (sky * (1 - cover) + np.float32([246, 244, 240]) * cover).clip(0, 255).astype(np.uint8)

    def _floor(
        self, plane: NDArray, inverse_depth: NDArray[np.float32], camera: Camera, first: int
    ) -> NDArray[np.uint8]:
        """Rows from ``first`` on, as if the ground reached everywhere."""
        width, height = camera.image_size
        lift = np.array([[1, 0, 0], [0, 1, -first], [0, 0, 1.0]])
        size = (width, height - first)
        border = dict(borderMode=cv2.BORDER_CONSTANT, borderValue=self._ground.mean_colour)
        fine2image = lift @ plane @ self._ground.image2world
        # A coarse texel is eight fine ones; its centre lies 3.5 fine texels after its corner.
        coarse2fine = np.array([[8, 0, 3.5], [0, 8, 3.5], [0, 0, 1.0]])
        fine = cv2.warpPerspective(self._ground.image, fine2image, size, flags=cv2.INTER_LINEAR, **border)
        coarse = cv2.warpPerspective(
            self._ground.coarse, fine2image @ coarse2fine, size, flags=cv2.INTER_LINEAR, **border
        )
        if width >= 800:
            origin = self._ground.image2world.copy()
            origin[0, 0] = origin[1, 1] = _DETAIL_TEXEL_M
            detail = cv2.warpPerspective(self._detail, lift @ plane @ origin, size, borderMode=cv2.BORDER_WRAP)
            fine = cv2.multiply(fine, cv2.merge([detail] * 3), scale=1 / 128)
        z = inverse_depth[first:]
        # Rows per 0.1 m texel, foreshortened: where it falls below one, the fine image would alias.
        sharp = np.clip(camera.intrinsics[1, 1] * 0.15 * z * z, 0, 1)
        haze = np.clip(1.2 - z * 60, 0, 0.6)
        far = np.full_like(coarse, np.asarray(self.haze))
        coarse = cv2.blendLinear(coarse, far, 1 - haze, haze)
        return cv2.blendLinear(fine, coarse, sharp, 1 - sharp).astype(np.uint8)


def _clouds(rng: np.random.Generator) -> NDArray[np.uint8]:
    """(512, 512) cloud cover that tiles, 0 to 255."""
    cover = np.zeros((512, 512), np.float32)
    for cells, strength in ((4, 1.0), (8, 0.6), (16, 0.35), (64, 0.15)):
        noise = rng.normal(0, strength, (cells, cells)).astype(np.float32)
        wrapped = np.pad(noise, 2, mode="wrap")
        scale = 512 // cells
        large = cv2.resize(wrapped, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        cover += large[2 * scale : 2 * scale + 512, 2 * scale : 2 * scale + 512]
    bias = rng.uniform(-0.9, 0.5)
    return (np.clip((cover + bias) * 0.8, 0, 1) * 235).astype(np.uint8)
