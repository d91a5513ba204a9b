"""An image with a depth buffer into which convex polygons are drawn."""
from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from mdp_mmdet3d.datasets.mini_nuscenes.rig import Camera

NEAR_M = 0.25
_SHIFT = 4
_SCALE = 2**_SHIFT

Window = tuple[slice, slice]


class Canvas:
    """Image, depth buffer and owner of every pixel of one camera.

    Args:
        camera: Intrinsics and image size.
        image: (H, W, 3) BGR uint8 to draw on.
        inverse_depth: (H, W) float32, 1/m, what is on the image so far.

    Attributes:
        image: The image.
    """

    def __init__(self, camera: Camera, image: NDArray[np.uint8], inverse_depth: NDArray[np.float32]) -> None:
        height, width = image.shape[:2]
        self.image = image
        self._inverse_depth = inverse_depth
        self._owners = np.full((height, width), -1, np.int16)
        self._intrinsics = camera.intrinsics
        self._silhouette = np.zeros((height, width), np.uint8)
        self._touched: list[Window] = []
        self._u = np.arange(width, dtype=np.float32)[None]
        self._v = np.arange(height, dtype=np.float32)[:, None]

    def darken(self, polygons: list[NDArray[np.float64]]) -> None:
        """Cast shadows: darken everything inside polygons (n, 3) of the camera frame."""
        mask = np.zeros(self.image.shape[:2], np.uint8)
        for polygon in polygons:
            points = self._project(polygon)
            if points is not None and self._window(points) is not None:
                cv2.fillConvexPoly(mask, points, [255], cv2.LINE_AA, _SHIFT)
        top = int(mask.any(1).argmax())
        gain = 255 - mask[top:] // 5 * 2
        cv2.multiply(self.image[top:], cv2.merge([gain, gain, gain]), self.image[top:], 1 / 255)

    def fill(self, vertices: NDArray, plane: NDArray, colour: NDArray[np.uint8], owner: int) -> None:
        """Draw a polygon in one colour where nothing is nearer.

        Args:
            vertices: (n, 3) in the camera frame.
            plane: (3,) such that the inverse depth of pixel (u, v) is ``plane . (u, v, 1)``.
            colour: (3,) BGR.
            owner: Index of the object, -1 for none.
        """
        found = self._visible(vertices, plane, owner >= 0)
        if found is not None:
            window, visible = found
            self.image[window][visible] = colour
            self._owners[window][visible] = owner

    def fill_textured(
        self, vertices: NDArray, plane: NDArray, texture: NDArray[np.uint8], gain: float, veil: NDArray
    ) -> None:
        """Draw a quadrilateral with an image on it, multiplied by ``gain`` plus the BGR colour ``veil``."""
        found = self._visible(vertices, plane, False)
        if found is None or not found[1].any():
            return
        (rows, columns), visible = found
        corners = vertices[:4]
        # Camera y points down: the texture's first row belongs to the upper edge.
        if corners[0, 1] > corners[2, 1]:
            corners = np.roll(corners, 2, axis=0)
        height, width = texture.shape[:2]
        across, down = (corners[1] - corners[0]) / width, (corners[3] - corners[0]) / height
        texel2pixel = self._intrinsics @ np.stack([across, down, corners[0]], 1)
        shift = np.array([[1, 0, -columns.start], [0, 1, -rows.start], [0, 0, 1.0]])
        size = columns.stop - columns.start, rows.stop - rows.start
        seen = cv2.warpPerspective(texture, shift @ texel2pixel, size, borderMode=cv2.BORDER_REPLICATE)
        seen = cv2.transform(seen, np.column_stack([gain * np.eye(3), veil]))
        cv2.copyTo(seen, visible.view(np.uint8), self.image[rows, columns])
        self._owners[rows, columns][visible] = -1

    def take_silhouette(self) -> int:
        """Number of pixels covered by the owned polygons since the last call, hidden or not."""
        if not self._touched:
            return 0
        rows = [rows for rows, _ in self._touched]
        columns = [columns for _, columns in self._touched]
        part = self._silhouette[
            min(r.start for r in rows) : max(r.stop for r in rows),
            min(c.start for c in columns) : max(c.stop for c in columns),
        ]
        covered = cv2.countNonZero(part)
        part[:] = 0
        self._touched.clear()
        return covered

    def visible_pixels(self) -> dict[int, int]:
        """Number of pixels that each object owns."""
        counts = np.bincount(self._owners.ravel() + 1)
        return {int(i): int(counts[i + 1]) for i in np.flatnonzero(counts[1:])}

    def _visible(
        self, vertices: NDArray, plane: NDArray, owned: bool
    ) -> tuple[Window, NDArray[np.bool_]] | None:
        """Window of a polygon and the pixels in it where it is the nearest thing; updates the depth buffer."""
        points = self._project(vertices)
        window = None if points is None else self._window(points)
        if points is None or window is None:
            return None
        rows, columns = window
        mask = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.uint8)
        points -= np.array([columns.start * _SCALE, rows.start * _SCALE], np.int32)
        cv2.fillConvexPoly(mask, points, [1], cv2.LINE_8, _SHIFT)
        if owned:
            self._silhouette[window] |= mask
            self._touched.append(window)
        a, b, c = plane.tolist()
        depth = np.float32(a) * self._u[:, columns] + (np.float32(b) * self._v[rows] + np.float32(c))
        buffer = self._inverse_depth[window]
        visible = mask.view(bool)
        visible &= depth > buffer
        np.copyto(buffer, depth, where=visible)
        return window, visible

    def _project(self, vertices: NDArray) -> NDArray[np.int32] | None:
        """Fixed-point pixels (n, 2) of the part of a polygon before the camera."""
        if vertices[:, 2].min() < NEAR_M:
            vertices = _clipped(vertices)
            if len(vertices) < 3:
                return None
        pixels = vertices @ self._intrinsics.T
        return np.rint(pixels[:, :2] / pixels[:, 2:] * _SCALE).astype(np.int32)

    def _window(self, points: NDArray[np.int32]) -> Window | None:
        """(rows, columns) of the image that fixed-point pixels may touch."""
        height, width = self.image.shape[:2]
        (u0, v0), (u1, v1) = points.min(0).tolist(), points.max(0).tolist()
        left, right = max(u0 >> _SHIFT, 0), min((u1 >> _SHIFT) + 2, width)
        top, bottom = max(v0 >> _SHIFT, 0), min((v1 >> _SHIFT) + 2, height)
        if left >= right or top >= bottom:
            return None
        return slice(top, bottom), slice(left, right)


def _clipped(vertices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Part of a convex polygon with z of at least ``NEAR_M``."""
    result = []
    for here, there in zip(vertices, np.roll(vertices, -1, axis=0)):
        if here[2] >= NEAR_M:
            result.append(here)
        if (here[2] >= NEAR_M) != (there[2] >= NEAR_M):
            share = (NEAR_M - here[2]) / (there[2] - here[2])
            result.append(here + share * (there - here))
    return np.asarray(result)
