"""What a camera sees: polygons in a depth buffer over ground, shadows and sky."""
from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from mdp_mmdet3d.datasets.mini_nuscenes.backdrop import Backdrop
from mdp_mmdet3d.datasets.mini_nuscenes.rig import Camera

NEAR_M = 0.25
_SHIFT = 4
_AMBIENT = 0.62
_HAZE_M = 420.0


@dataclass(frozen=True)
class PolygonSet:
    """Polygons of many things in the global frame, grouped by thing.

    Attributes:
        vertices: (F, V, 3) metres, outward winding.
        colours: (F, 3) BGR.
        textures: (F,) index of a texture, -1 for none.
        owners: (F,) index of the annotated object, -1 for scenery; equal owners are adjacent.
    """

    vertices: NDArray[np.float64]
    colours: NDArray[np.float64]
    textures: NDArray[np.int64]
    owners: NDArray[np.int64]


@dataclass(frozen=True)
class View:
    """One rendered image and what it shows of each object.

    Attributes:
        image: (H, W, 3) BGR uint8.
        owners: (H, W) index of the object a pixel belongs to, -1 for none.
        silhouettes: Object index to the pixels that it would cover if nothing stood in front of it.
    """

    image: NDArray[np.uint8]
    owners: NDArray[np.int32]
    silhouettes: dict[int, int]


def render(
    camera: Camera,
    cam2global: NDArray[np.float64],
    polygons: PolygonSet,
    backdrop: Backdrop,
    shadows: list[NDArray[np.float64]],
    textures: tuple[NDArray[np.uint8], ...],
) -> View:
    """Draw one image.

    Args:
        camera: Intrinsics and image size.
        cam2global: (4, 4) pose of the camera when it fires.
        polygons: Everything that stands on the ground.
        backdrop: Ground, sky and light.
        shadows: Convex polygons (n, 2) on the ground, global metres.
        textures: Images that ``polygons.textures`` refers to.
    """
    global2cam = np.linalg.inv(cam2global)
    frame = backdrop.draw(camera, global2cam)
    canvas = _Canvas(camera, frame.image, frame.inverse_depth)
    canvas.darken([_to_camera(np.pad(polygon, ((0, 0), (0, 1))), global2cam) for polygon in shadows])

    vertices = _to_camera(polygons.vertices, global2cam)
    edge1, edge2 = vertices[:, 1] - vertices[:, 0], vertices[:, 2] - vertices[:, 0]
    normals = np.cross(edge1, edge2)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    offsets = np.einsum("ij,ij->i", normals, vertices[:, 0])
    shown = (offsets < 0) & (vertices[:, :, 2].max(1) > NEAR_M) & _in_view(vertices, camera)
    light = _AMBIENT + (1 - _AMBIENT) * np.clip(normals @ (global2cam[:3, :3] @ backdrop.sun), 0, None)
    distance = np.clip(vertices[:, :, 2].mean(1), 0, None)
    haze = np.exp(-distance / _HAZE_M)[:, None]
    colours = polygons.colours * light[:, None] * haze + np.asarray(backdrop.haze) * (1 - haze)

    silhouettes: dict[int, int] = {}
    indices = np.flatnonzero(shown)
    boundaries = np.flatnonzero(np.diff(polygons.owners[indices])) + 1
    for group in np.split(indices, boundaries):
        if not len(group):
            continue
        owner = int(polygons.owners[group[0]])
        for i in group.tolist():
            texture = int(polygons.textures[i])
            if texture >= 0:
                gain = float(light[i] * haze[i, 0]), np.asarray(backdrop.haze) * (1 - haze[i])
                canvas.fill_textured(vertices[i], normals[i], offsets[i], textures[texture], gain)
            else:
                canvas.fill(vertices[i], normals[i], offsets[i], colours[i], owner)
        if owner >= 0:
            covered = canvas.take_silhouette()
            if covered:
                silhouettes[owner] = covered
    return View(backdrop.develop(canvas.image), canvas.owners, silhouettes)


class _Canvas:
    """Image, depth buffer and owners of one camera."""

    def __init__(self, camera: Camera, image: NDArray[np.uint8], inverse_depth: NDArray[np.float32]) -> None:
        self.image = image
        self.owners = np.full(image.shape[:2], -1, np.int32)
        self._inverse_depth = inverse_depth
        self._intrinsics = camera.intrinsics
        self._inverse_intrinsics = np.linalg.inv(camera.intrinsics)
        self._silhouette = np.zeros(image.shape[:2], np.uint8)
        self._extent = [0, 0, 0, 0]
        self._reset_extent()

    def darken(self, polygons: list[NDArray[np.float64]]) -> None:
        """Cast shadows: darken the ground inside polygons (n, 3) of the camera frame."""
        mask = np.zeros(self.image.shape[:2], np.uint8)
        for polygon in polygons:
            points = self._project(polygon)
            if points is not None and self._window(points) is not None:
                cv2.fillConvexPoly(mask, points, 255, cv2.LINE_AA, _SHIFT)
        gain = cv2.merge([255 - mask // 5 * 2] * 3)
        cv2.multiply(self.image, gain, self.image, 1 / 255)

    def fill(
        self, vertices: NDArray, normal: NDArray, offset: float, colour: NDArray[np.float64], owner: int
    ) -> None:
        """Draw a polygon (n, 3) of the camera frame in one colour where nothing is nearer."""
        found = self._visible(vertices, normal, offset, owner >= 0)
        if found is None:
            return
        window, visible = found
        self.image[window][visible] = colour.clip(0, 255).astype(np.uint8)
        self.owners[window][visible] = owner

    def fill_textured(
        self,
        vertices: NDArray,
        normal: NDArray,
        offset: float,
        texture: NDArray[np.uint8],
        gain: tuple[float, NDArray],
    ) -> None:
        """Draw a quadrilateral with an image on it; ``gain`` is (factor, BGR offset)."""
        found = self._visible(vertices, normal, offset, False)
        if found is None:
            return
        window, visible = found
        corners = vertices[:4]
        height, width = texture.shape[:2]
        across, down = (corners[1] - corners[0]) / width, (corners[3] - corners[0]) / height
        texel2pixel = self._intrinsics @ np.stack([across, down, corners[0]], 1)
        shift = np.array([[1, 0, -window[1].start], [0, 1, -window[0].start], [0, 0, 1.0]])
        size = window[1].stop - window[1].start, window[0].stop - window[0].start
        seen = cv2.warpPerspective(texture, shift @ texel2pixel, size, borderMode=cv2.BORDER_REPLICATE)
        colours = seen[visible].astype(np.float32) * gain[0] + gain[1].astype(np.float32)
        self.image[window][visible] = colours.clip(0, 255).astype(np.uint8)
        self.owners[window][visible] = -1

    def take_silhouette(self) -> int:
        """Number of pixels covered by the owned polygons since the last call."""
        top, bottom, left, right = self._extent
        if bottom <= top:
            return 0
        part = self._silhouette[top:bottom, left:right]
        covered = cv2.countNonZero(part)
        part[:] = 0
        self._reset_extent()
        return covered

    def _visible(
        self, vertices: NDArray, normal: NDArray, offset: float, owned: bool
    ) -> tuple[tuple[slice, slice], NDArray[np.bool_]] | None:
        """Window of a polygon and the pixels in it where it is the nearest thing; updates the depth buffer."""
        points = self._project(vertices)
        window = None if points is None else self._window(points)
        if points is None or window is None:
            return None
        rows, columns = window
        mask = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.uint8)
        origin = np.array([columns.start, rows.start]) * 2**_SHIFT
        cv2.fillConvexPoly(mask, (points - origin).astype(np.int32), 1, cv2.LINE_8, _SHIFT)
        if owned:
            part = self._silhouette[window]
            np.bitwise_or(part, mask, part)
            top, bottom, left, right = self._extent
            self._extent = [
                min(top, rows.start), max(bottom, rows.stop), min(left, columns.start), max(right, columns.stop)
            ]
        # On the plane n . P = o the inverse depth is linear in the pixel: 1/z = n . K^-1 (u, v, 1) / o.
        a, b, c = (normal @ self._inverse_intrinsics / offset).tolist()
        u = np.arange(columns.start, columns.stop, dtype=np.float32)
        v = np.arange(rows.start, rows.stop, dtype=np.float32)
        depth = (np.float32(a) * u)[None] + (np.float32(b) * v + np.float32(c))[:, None]
        buffer = self._inverse_depth[window]
        visible = mask.view(bool) & (depth > buffer)
        np.copyto(buffer, depth, where=visible)
        return window, visible

    def _project(self, vertices: NDArray) -> NDArray[np.int32] | None:
        """Fixed-point pixels (n, 2) of the part of a polygon before the camera."""
        if vertices[:, 2].min() < NEAR_M:
            vertices = _clipped(vertices)
            if len(vertices) < 3:
                return None
        pixels = vertices @ self._intrinsics.T
        pixels = pixels[:, :2] / pixels[:, 2:]
        return np.round(pixels * 2**_SHIFT).astype(np.int32)

    def _window(self, points: NDArray[np.int32]) -> tuple[slice, slice] | None:
        """(rows, columns) of the image that fixed-point pixels may touch."""
        height, width = self.image.shape[:2]
        low, high = (points.min(0) >> _SHIFT).tolist(), ((points.max(0) >> _SHIFT) + 2).tolist()
        left, right, top, bottom = max(low[0], 0), min(high[0], width), max(low[1], 0), min(high[1], height)
        if left >= right or top >= bottom:
            return None
        return slice(top, bottom), slice(left, right)

    def _reset_extent(self) -> None:
        height, width = self.image.shape[:2]
        self._extent = [height, 0, width, 0]


def _to_camera(points: NDArray[np.float64], global2cam: NDArray[np.float64]) -> NDArray[np.float64]:
    return points @ global2cam[:3, :3].T + global2cam[:3, 3]


def _in_view(vertices: NDArray[np.float64], camera: Camera) -> NDArray[np.bool_]:
    """(F,) False for polygons that lie entirely to the left or to the right of the image."""
    width = camera.image_size[0]
    focal, centre = camera.intrinsics[0, 0], camera.intrinsics[0, 2]
    x, z = vertices[:, :, 0], vertices[:, :, 2]
    left = focal * x + centre * z < 0
    right = focal * x + (centre - width) * z > 0
    return ~(left.all(1) | right.all(1))


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
