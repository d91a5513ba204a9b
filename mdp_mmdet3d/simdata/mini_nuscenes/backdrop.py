"""Ground, sky, light and the grain of the sensor."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from mdp_mmdet3d.simdata.mini_nuscenes.ground import RESOLUTION_M, Ground
from mdp_mmdet3d.simdata.mini_nuscenes.rig import Camera

CLOUD_HEIGHT_M = 300.0
_CLOUD_TEXEL_M = 3.0
_DETAIL_TEXEL_M = 0.02
_GRAIN_SHIFT = 64
_CLOUD = (240.0, 244.0, 246.0)


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
        self._zenith = tuple((np.array([205, 150, 100]) * rng.uniform(0.75, 1.05)).tolist())
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
            image = cv2.GaussianBlur(image, (3, 3), 0.6).astype(np.uint8, copy=False)
        y, x = self._rng.integers(0, _GRAIN_SHIFT, 2).tolist()
        if self._grain is None or self._grain.shape[:2] != (height + _GRAIN_SHIFT, width + _GRAIN_SHIFT):
            shape = (height + _GRAIN_SHIFT, width + _GRAIN_SHIFT, 3)
            self._grain = self._rng.normal(0, 2.5, shape).astype(np.int16)
        return cv2.add(image, self._grain[y : y + height, x : x + width], dtype=cv2.CV_8U).astype(np.uint8)

    def _sky(self, camera: Camera, global2cam: NDArray, elevation: NDArray[np.float32]) -> NDArray[np.uint8]:
        rows, width = elevation.shape
        if rows == 0:
            return np.empty((0, width, 3), np.uint8)
        ceiling = global2cam[:3, 3] + CLOUD_HEIGHT_M * global2cam[:3, 2]
        plane = camera.intrinsics @ np.stack([global2cam[:3, 0], global2cam[:3, 1], ceiling], 1)
        texel2world = np.diag([_CLOUD_TEXEL_M, _CLOUD_TEXEL_M, 1.0])
        cover = cv2.warpPerspective(self._clouds, plane @ texel2world, (width, rows), borderMode=cv2.BORDER_WRAP)
        cover = cover * np.clip(elevation * 5 - 0.3, 0, 1)
        shade = np.sqrt(np.clip(elevation, 0, 1))
        sky = _blend(self._zenith, self.haze, shade)
        return cv2.blendLinear(_constant(_CLOUD, sky.shape), sky, cover, 1 - cover).astype(np.uint8)

    def _floor(
        self, plane: NDArray, inverse_depth: NDArray[np.float32], camera: Camera, first: int
    ) -> NDArray[np.uint8]:
        """Rows from ``first`` on, as if the ground reached everywhere."""
        z = inverse_depth[first:]
        # Rows per 0.1 m texel, foreshortened: where it falls below one, the fine image would alias.
        sharp = np.clip(camera.intrinsics[1, 1] * 0.15 * z * z, 0, 1)
        rows, width = z.shape
        edges = sharp[:, [0, -1]]
        begin = int((edges.max(1) > 0.02).argmax()) if edges.max() > 0.02 else rows
        end = int((edges.min(1) >= 1).argmax()) if edges[-1].min() >= 1 else rows
        result = np.empty((rows, width, 3), np.uint8)
        far = self._layer(self._ground.coarse, 8 * RESOLUTION_M, plane, first, width, end)
        haze = np.clip(1.2 - z[:end] * 60, 0, 0.6)
        far = cv2.blendLinear(_constant(self.haze, far.shape), far, haze, 1 - haze).astype(np.uint8, copy=False)
        near = self._layer(self._ground.image, RESOLUTION_M, plane, first + begin, width, rows - begin)
        if width >= 800:
            detail = self._layer(
                self._detail, _DETAIL_TEXEL_M, plane, first + begin, width, rows - begin, cv2.BORDER_WRAP
            )
            near = cv2.multiply(near, cv2.merge([detail, detail, detail]), scale=1 / 128).astype(np.uint8, copy=False)
        result[:begin] = far[:begin]
        share = sharp[begin:end]
        if end > begin:
            result[begin:end] = cv2.blendLinear(near[: end - begin], far[begin:], share, 1 - share)
        result[max(begin, end) :] = near[max(end - begin, 0) :]
        return result

    def _layer(
        self,
        image: NDArray[np.uint8],
        texel_m: float,
        plane: NDArray,
        first: int,
        width: int,
        rows: int,
        border: int = cv2.BORDER_CONSTANT,
    ) -> NDArray[np.uint8]:
        """An image of the ground with texels of ``texel_m`` as the camera sees it, from row ``first`` on."""
        if rows <= 0:
            return np.empty((0, width, *image.shape[2:]), np.uint8)
        texel2world = self._ground.image2world.copy()
        texel2world[0, 0] = texel2world[1, 1] = texel_m
        # Texel centres lie half a texel after the corner of the image.
        texel2world[:2, 2] += (texel_m - RESOLUTION_M) / 2
        lift = np.array([[1, 0, 0], [0, 1, -first], [0, 0, 1.0]])
        return cv2.warpPerspective(
            image,
            lift @ plane @ texel2world,
            (width, rows),
            borderMode=border,
            borderValue=self._ground.mean_colour,
        ).astype(np.uint8, copy=False)


def _constant(colour: tuple[float, float, float], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    image = np.empty(shape, np.uint8)
    image[:] = np.asarray(colour).clip(0, 255)
    return image


def _blend(
    upper: tuple[float, float, float], lower: tuple[float, float, float], share: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Two colours mixed by the (H, W) ``share`` of the first."""
    channels = [cv2.convertScaleAbs(share, alpha=a - b, beta=b) for a, b in zip(upper, lower)]
    return cv2.merge(channels).astype(np.uint8, copy=False)


def _clouds(rng: np.random.Generator) -> NDArray[np.float32]:
    """(512, 512) cloud cover that tiles, 0 to 1."""
    cover = np.zeros((512, 512), np.float32)
    for cells, strength in ((4, 1.0), (8, 0.6), (16, 0.35), (64, 0.15)):
        noise = rng.normal(0, strength, (cells, cells)).astype(np.float32)
        wrapped = np.pad(noise, 2, mode="wrap")
        scale = 512 // cells
        large = cv2.resize(wrapped, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        cover += large[2 * scale : 2 * scale + 512, 2 * scale : 2 * scale + 512]
    bias = rng.uniform(-0.9, 0.5)
    return (np.clip((cover + bias) * 0.8, 0, 1) * 0.92).astype(np.float32)
