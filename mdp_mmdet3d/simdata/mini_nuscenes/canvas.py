"""An image with a depth buffer into which convex polygons are drawn."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from mdp_mmdet3d.simdata.mini_nuscenes.rig import Camera

NEAR_M = 0.25
_SHIFT = 4
_SCALE = 2**_SHIFT
_SMALLEST_PX = 0.7
_FAR_PX = 2.0**27

Window = tuple[slice, slice]


class Outline(NamedTuple):
    """A polygon in the image: fixed-point pixels (n, 2) and the (rows, columns) that it may touch."""

    points: NDArray[np.int32]
    window: Window


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

    def outlines(self, vertices: NDArray[np.float64]) -> list[Outline | None]:
        """Where polygons lie in the image.

        Args:
            vertices: (F, V, 3) in the camera frame.

        Returns:
            Per polygon its outline, None where it is out of the image or too small to be seen.
        """
        crossing = np.flatnonzero(vertices[:, :, 2].min(1) < NEAR_M)
        with np.errstate(divide="ignore", invalid="ignore"):
            points = self._project(np.where(vertices[:, :, 2:] < NEAR_M, np.nan, vertices))
        low, high = points.min(1), points.max(1)
        large = ((high - low) >= _SMALLEST_PX * _SCALE).any(1)
        windows = self._windows(low, high)
        found: list[Outline | None] = [
            Outline(polygon, window) if window and seen else None
            for polygon, window, seen in zip(points, windows, large.tolist())
        ]
        for i in crossing.tolist():
            clipped = _clipped(vertices[i])
            found[i] = None
            if len(clipped) >= 3:
                polygon = self._project(clipped)
                window = self._windows(polygon.min(0)[None], polygon.max(0)[None])[0]
                found[i] = Outline(polygon, window) if window else None
        return found

    def darken(self, outlines: list[Outline | None]) -> None:
        """Cast shadows: darken everything inside the outlines."""
        mask = np.zeros(self.image.shape[:2], np.uint8)
        for outline in outlines:
            if outline is not None:
                cv2.fillConvexPoly(mask, outline.points, [255], cv2.LINE_AA, _SHIFT)
        top = int(mask.any(1).argmax())
        gain = 255 - mask[top:] // 5 * 2
        cv2.multiply(self.image[top:], cv2.merge([gain, gain, gain]), self.image[top:], 1 / 255)

    def fill(self, outline: Outline, plane: NDArray, colour: NDArray[np.uint8], owner: int) -> None:
        """Draw a polygon in one colour where nothing is nearer.

        Args:
            outline: Where it is.
            plane: (3,) such that the inverse depth of pixel (u, v) is ``plane . (u, v, 1)``.
            colour: (3,) BGR.
            owner: Index of the object, -1 for none.
        """
        visible = self._visible(outline, plane, owner >= 0)
        self.image[outline.window][visible] = colour
        self._owners[outline.window][visible] = owner

    def fill_textured(
        self,
        outline: Outline,
        plane: NDArray,
        corners: NDArray,
        texture: NDArray[np.uint8],
        gain: float,
        veil: NDArray,
    ) -> None:
        """Draw a quadrilateral with corners (4, 3) and an image on it, times ``gain`` plus the BGR colour ``veil``."""
        visible = self._visible(outline, plane, False)
        if not visible.any():
            return
        rows, columns = outline.window
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

    def _visible(self, outline: Outline, plane: NDArray, owned: bool) -> NDArray[np.bool_]:
        """Pixels of the outline's window where the polygon is the nearest thing; updates the depth buffer."""
        window = rows, columns = outline.window
        mask = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.uint8)
        offset = (-columns.start * _SCALE, -rows.start * _SCALE)
        cv2.fillConvexPoly(mask, outline.points + np.array(offset, np.int32), [1], cv2.LINE_8, _SHIFT)
        if owned:
            self._silhouette[window] |= mask
            self._touched.append(window)
        a, b, c = plane.tolist()
        depth = np.float32(a) * self._u[:, columns] + (np.float32(b) * self._v[rows] + np.float32(c))
        buffer = self._inverse_depth[window]
        visible = mask.view(bool)
        visible &= depth > buffer
        np.copyto(buffer, depth, where=visible)
        return visible

    def _project(self, vertices: NDArray) -> NDArray[np.int32]:
        """Fixed-point pixels (..., n, 2) of vertices (..., n, 3)."""
        pixels = vertices @ self._intrinsics.T
        pixels = np.clip(pixels[..., :2] / pixels[..., 2:] * _SCALE, -_FAR_PX, _FAR_PX)
        return np.rint(np.nan_to_num(pixels)).astype(np.int32)

    def _windows(self, low: NDArray[np.int32], high: NDArray[np.int32]) -> list[Window | None]:
        """(rows, columns) of the image that fixed-point pixels between two corners (F, 2) may touch."""
        size = np.array([self.image.shape[1], self.image.shape[0]])
        begin, end = np.maximum(low >> _SHIFT, 0), np.minimum((high >> _SHIFT) + 2, size)
        inside = (begin < end).all(1)
        return [
            (slice(top, bottom), slice(left, right)) if seen else None
            for (left, top), (right, bottom), seen in zip(begin.tolist(), end.tolist(), inside.tolist())
        ]


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
