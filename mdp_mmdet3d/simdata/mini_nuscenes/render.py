"""What a camera sees: polygons in a depth buffer over ground, shadows and sky."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mdp_mmdet3d.simdata.mini_nuscenes.backdrop import Backdrop
from mdp_mmdet3d.simdata.mini_nuscenes.canvas import NEAR_M, Canvas
from mdp_mmdet3d.simdata.mini_nuscenes.rig import Camera

_AMBIENT = 0.62
_HAZE_M = 420.0


@dataclass(frozen=True)
class PolygonSet:
    """Polygons of many things in the global frame.

    Attributes:
        vertices: (F, V, 3) metres, outward winding.
        colours: (F, 3) BGR.
        textures: (F,) index of a texture, -1 for none.
        things: (F,) index of the thing, increasing.
        owners: (things,) index of the annotated object, -1 for scenery.
    """

    vertices: NDArray[np.float64]
    colours: NDArray[np.float64]
    textures: NDArray[np.int64]
    things: NDArray[np.int64]
    owners: NDArray[np.int64]


@dataclass(frozen=True)
class View:
    """One rendered image and what it shows of each object.

    Attributes:
        image: (H, W, 3) BGR uint8.
        visible: Object index to the number of pixels that show it.
        silhouettes: Object index to the number that would show it if nothing stood in front of it.
    """

    image: NDArray[np.uint8]
    visible: dict[int, int]
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
    canvas = Canvas(camera, frame.image, frame.inverse_depth)
    grounded = [_to_camera(np.pad(shadow, ((0, 0), (0, 1))), global2cam)[None] for shadow in shadows]
    canvas.darken([outline for shadow in grounded for outline in canvas.outlines(shadow)])

    vertices = _to_camera(polygons.vertices, global2cam)
    normals = np.cross(vertices[:, 1] - vertices[:, 0], vertices[:, 2] - vertices[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    offsets = np.einsum("ij,ij->i", normals, vertices[:, 0])
    depth = vertices[:, :, 2]
    order = np.flatnonzero((offsets < 0) & (depth.max(1) > NEAR_M) & _in_view(vertices, camera))
    # Front to back: what is hidden later costs no painting. The result does not depend on the order.
    distance = np.full(len(polygons.owners), np.inf)
    np.minimum.at(distance, polygons.things, depth.min(1))
    order = order[np.lexsort((polygons.things[order], distance[polygons.things[order]]))]

    light = _AMBIENT + (1 - _AMBIENT) * np.clip(normals @ (global2cam[:3, :3] @ backdrop.sun), 0, None)
    haze = 1 - np.exp(-np.clip(depth.mean(1), 0, None) / _HAZE_M)
    gains = light * (1 - haze)
    veils = haze[:, None] * np.asarray(backdrop.haze)
    colours = (polygons.colours * gains[:, None] + veils).clip(0, 255).astype(np.uint8)
    planes = normals @ np.linalg.inv(camera.intrinsics) / offsets[:, None]

    outlines = dict(zip(order.tolist(), canvas.outlines(vertices[order])))
    silhouettes: dict[int, int] = {}
    for group in np.split(order, np.flatnonzero(np.diff(polygons.things[order])) + 1):
        if not len(group):
            continue
        owner = int(polygons.owners[polygons.things[group[0]]])
        for i in group.tolist():
            outline, texture = outlines[i], int(polygons.textures[i])
            if outline is None:
                continue
            if texture < 0:
                canvas.fill(outline, planes[i], colours[i], owner)
            else:
                image, gain = textures[texture], float(gains[i])
                canvas.fill_textured(outline, planes[i], vertices[i, :4], image, gain, veils[i])
        if owner >= 0:
            covered = canvas.take_silhouette()
            if covered:
                silhouettes[owner] = covered
    return View(backdrop.develop(canvas.image), canvas.visible_pixels(), silhouettes)


def _to_camera(points: NDArray[np.float64], global2cam: NDArray[np.float64]) -> NDArray[np.float64]:
    return points @ global2cam[:3, :3].T + global2cam[:3, 3]


def _in_view(vertices: NDArray[np.float64], camera: Camera) -> NDArray[np.bool_]:
    """(F,) False for polygons that lie entirely beyond one edge of the image."""
    pixels = vertices @ camera.intrinsics.T
    z = pixels[:, :, 2]
    width, height = camera.image_size
    beyond = [pixels[:, :, 0] < 0, pixels[:, :, 0] > width * z, pixels[:, :, 1] < 0, pixels[:, :, 1] > height * z]
    return ~np.any([side.all(1) for side in beyond], axis=0)
