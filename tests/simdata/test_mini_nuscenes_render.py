"""Pixels are where the geometry says, nearest things first."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from mdp_mmdet3d.simdata.mini_nuscenes.backdrop import Backdrop
from mdp_mmdet3d.simdata.mini_nuscenes.canvas import Canvas
from mdp_mmdet3d.simdata.mini_nuscenes.geometry import placed
from mdp_mmdet3d.simdata.mini_nuscenes.ground import Ground
from mdp_mmdet3d.simdata.mini_nuscenes.mesh import MeshBuilder
from mdp_mmdet3d.simdata.mini_nuscenes.render import PolygonSet, render
from mdp_mmdet3d.simdata.mini_nuscenes.rig import make_rig

SIZE = (800, 450)


@pytest.fixture(scope="module")
def backdrop():
    image = np.full((800, 800, 3), 90, np.uint8)
    ground = Ground(image, image[::8, ::8].copy(), np.array([[0.1, 0, -40], [0, 0.1, -40], [0, 0, 1.0]]), (90, 90, 90))
    return Backdrop(np.random.default_rng(0), ground)


@pytest.fixture(scope="module")
def camera():
    return make_rig(np.random.default_rng(0), SIZE).cameras[0]


def polygons_of(boxes):
    """Boxes as ((x, y), (length, width, height), colour), each its own object."""
    meshes = []
    for (x, y), (length, width, height), colour in boxes:
        builder = MeshBuilder()
        builder.box((-length / 2, length / 2), (-width / 2, width / 2), (0, height), colour)
        mesh = builder.build()
        meshes.append((placed(mesh.polygons, np.array([x, y, 0, 0.3])), mesh))
    return PolygonSet(
        vertices=np.concatenate([polygons for polygons, _ in meshes]),
        colours=np.concatenate([mesh.colours for _, mesh in meshes]),
        textures=np.concatenate([mesh.textures for _, mesh in meshes]),
        things=np.repeat(np.arange(len(boxes)), [len(mesh.polygons) for _, mesh in meshes]),
        owners=np.arange(len(boxes)),
    )


def hull(camera, vertices):
    """Convex hull of projected points, float32 pixels."""
    points = vertices.reshape(-1, 3)
    camera_points = (points - camera.cam2ego[:3, 3]) @ camera.cam2ego[:3, :3]
    pixels = camera_points @ camera.intrinsics.T
    return cv2.convexHull((pixels[:, :2] / pixels[:, 2:]).astype(np.float32))


def test_a_box_covers_the_hull_of_its_projected_corners(camera, backdrop):
    polygons = polygons_of([((15, 2), (4, 2, 1.6), (20, 200, 20))])
    view = render(camera, camera.cam2ego, polygons, backdrop, [], ())
    expected = hull(camera, polygons.vertices)
    green = (view.image[..., 1] > view.image[..., 0].astype(int) + 40).astype(np.uint8)
    assert view.visible[0] == pytest.approx(view.silhouettes[0], rel=0.01)
    assert view.visible[0] == pytest.approx(cv2.contourArea(expected), rel=0.05)
    x, y, w, h = cv2.boundingRect(green)
    ex, ey, ew, eh = cv2.boundingRect(expected)
    assert np.abs(np.subtract([x, y, x + w, y + h], [ex, ey, ex + ew, ey + eh])).max() <= 2


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_nearer_box_hides_the_farther_in_any_order(camera, backdrop, order):
    boxes = [((12, 0), (1, 6, 3), (20, 200, 20)), ((25, 0), (2, 2, 1.5), (20, 20, 200))]
    polygons = polygons_of([boxes[i] for i in order])
    view = render(camera, camera.cam2ego, polygons, backdrop, [], ())
    near, far = order.index(0), order.index(1)
    assert view.visible[near] == pytest.approx(view.silhouettes[near], rel=0.01)
    assert far not in view.visible
    assert view.silhouettes[far] > 100


def test_interpenetrating_surfaces_are_cut_pixel_by_pixel(camera):
    image = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    canvas = Canvas(camera, image, np.zeros(image.shape[:2], np.float32))
    inverse = np.linalg.inv(camera.intrinsics)
    for owner, slope in enumerate((0.3, -0.3)):
        left, right = 10 - 5 * slope, 10 + 5 * slope
        square = np.array([[-5, -2, left], [5, -2, right], [5, 2, right], [-5, 2, left]])
        normal = np.cross(square[1] - square[0], square[2] - square[0])
        (outline,) = canvas.outlines(square[None])
        canvas.fill(outline, normal @ inverse / (normal @ square[0]), np.array([1, 2, 3], np.uint8), owner)
    visible = canvas.visible_pixels()
    assert visible[0] == pytest.approx(visible[1], rel=0.05)
    cut = int(camera.intrinsics[0, 2])
    middle = int(camera.intrinsics[1, 2])
    assert canvas._owners[middle, cut - 40] == 0
    assert canvas._owners[middle, cut + 40] == 1


def test_polygons_that_cross_the_image_plane_are_clipped(camera, backdrop):
    polygons = polygons_of([((4, 2.2), (14, 1, 3), (20, 200, 20))])
    view = render(camera, camera.cam2ego, polygons, backdrop, [], ())
    assert view.silhouettes[0] > 5000
    assert view.visible[0] == pytest.approx(view.silhouettes[0], rel=0.01)


def test_things_behind_the_camera_are_not_drawn(camera, backdrop):
    view = render(camera, camera.cam2ego, polygons_of([((-10, 0), (4, 2, 2), (0, 255, 0))]), backdrop, [], ())
    assert view.visible == {}
    assert view.silhouettes == {}


def test_ground_lies_below_the_horizon_and_a_shadow_darkens_it(camera, backdrop):
    polygons = polygons_of([((40, 30), (1, 1, 1), (0, 0, 0))])
    plain = render(camera, camera.cam2ego, polygons, backdrop, [], ()).image.astype(int)
    square = np.array([[8, -1], [10, -1], [10, 1], [8, 1.0]])
    shaded = render(camera, camera.cam2ego, polygons, backdrop, [square], ()).image.astype(int)
    points = np.pad(square, ((0, 0), (0, 1))).mean(0)
    u, v = np.round(hull(camera, points)[0, 0]).astype(int)
    assert plain[-1].mean() == pytest.approx(90, abs=6)
    assert plain[0, :, 0].mean() > plain[-1, :, 0].mean() + 30
    assert shaded[v, u].mean() < 0.75 * plain[v, u].mean()


def test_a_wall_shows_its_texture_upright(camera, backdrop):
    builder = MeshBuilder()
    corners = [(0, 4, 6), (0, -4, 6), (0, -4, 0), (0, 4, 0)]
    back = [(1, y, z) for _, y, z in corners]
    sides = [[corners[i], corners[(i + 1) % 4], back[(i + 1) % 4], back[i]] for i in range(4)]
    builder.polyhedron([corners, back, *sides], [(0, 0, 0)] * 6, [0, -1, -1, -1, -1, -1])
    mesh = builder.build()
    texture = np.zeros((60, 80, 3), np.uint8)
    texture[:30] = 250
    polygons = PolygonSet(
        mesh.polygons + np.array([20, 0, 0]), mesh.colours, mesh.textures, np.zeros(6, np.int64), np.array([-1])
    )
    image = render(camera, camera.cam2ego, polygons, backdrop, [], (texture,)).image.astype(int)
    upper = np.round(hull(camera, np.array([[20, 0, 4.5]]))[0, 0]).astype(int)
    lower = np.round(hull(camera, np.array([[20, 0, 1.5]]))[0, 0]).astype(int)
    assert image[upper[1], upper[0]].mean() > image[lower[1], lower[0]].mean() + 80
