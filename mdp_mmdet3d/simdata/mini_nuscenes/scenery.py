"""What stands around the road and is not annotated: houses, trees, lamp posts, a skyline."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from mdp_mmdet3d.simdata.mini_nuscenes.geometry import placed
from mdp_mmdet3d.simdata.mini_nuscenes.mesh import Colour, Mesh, MeshBuilder
from mdp_mmdet3d.simdata.mini_nuscenes.road import ROAD_EDGES_M, Road

STOREY_M = 3.2
_TEXELS_PER_M = 6
_WALLS: tuple[Colour, ...] = (
    (150, 160, 170),
    (120, 140, 165),
    (105, 120, 150),
    (170, 175, 178),
    (130, 130, 128),
    (95, 110, 140),
    (160, 150, 140),
)


@dataclass(frozen=True)
class Scenery:
    """Static things in the global frame.

    Attributes:
        meshes: One per thing, vertices in the global frame.
        positions: (n, 2) their places.
        reach_m: (n,) how far they extend from their place.
        textures: BGR images that the meshes' polygons refer to; the upper edge of a quadrilateral shows the first row.
    """

    meshes: tuple[Mesh, ...]
    positions: NDArray[np.float64]
    reach_m: NDArray[np.float64]
    textures: tuple[NDArray[np.uint8], ...]


def make_scenery(rng: np.random.Generator, road: Road) -> Scenery:
    """Line the road with houses and trees and close the horizon with a skyline."""
    meshes: list[Mesh] = []
    places: list[tuple[float, float, float]] = []
    textures: list[NDArray[np.uint8]] = []

    def add(builder: MeshBuilder, x: float, y: float, yaw: float, reach: float) -> None:
        mesh = builder.build()
        pose = np.array([x, y, 0.0, yaw])
        solids = mesh.solids.copy()
        turned = placed(solids[..., :3], np.array([0, 0, 0, yaw]))
        solids[..., 3] += turned @ pose[:3]
        solids[..., :3] = turned
        meshes.append(Mesh(placed(mesh.polygons, pose), mesh.colours, mesh.textures, solids, mesh.intensities))
        places.append((x, y, reach))

    for side in (-1, 1):
        s = rng.uniform(0, 10)
        while s < road.length_m - 25:
            length, depth = rng.uniform(14, 30), rng.uniform(9, 14)
            storeys = int(rng.integers(2, 9))
            setback = ROAD_EDGES_M["sidewalk"] + rng.uniform(2.5, 9) + depth / 2
            x, y, yaw = (float(v) for v in road.pose(s + length / 2, side * setback))
            textures.append(_facade(rng, length, storeys))
            add(_house(rng, length, depth, storeys * STOREY_M, len(textures) - 1), x, y, yaw, length / 2 + depth)
            s += length * (1.25 if side > 0 else 1.0) + rng.uniform(1, 14)
        for s in np.arange(rng.uniform(0, 8), road.length_m - 4, 11.0):
            place = s + rng.uniform(-2, 2)
            lateral = side * (ROAD_EDGES_M["sidewalk"] + rng.uniform(0.8, 2.0))
            x, y, yaw = (float(v) for v in road.pose(place, lateral))
            if rng.random() < 0.25:
                add(_lamp_post(-side), x, y, yaw, 3.0)
            elif rng.random() < 0.85:
                add(_tree(rng), x, y, rng.uniform(0, 6), 3.0)
            else:
                add(_hedge(rng), x, y, yaw, 3.0)
    for angle in np.arange(0, 2 * np.pi, 2 * np.pi / 44):
        angle = angle + rng.uniform(-0.05, 0.05)
        distance, size = rng.uniform(230, 330), rng.uniform(18, 40)
        storeys = int(rng.integers(4, 20))
        x, y = road.centre + distance * np.array([np.cos(angle), np.sin(angle)])
        textures.append(_facade(rng, size, storeys))
        add(_house(rng, size, size, storeys * STOREY_M, len(textures) - 1), x, y, angle + np.pi / 2, size)
    table = np.asarray(places)
    return Scenery(tuple(meshes), table[:, :2], table[:, 2], tuple(textures))


def _house(rng: np.random.Generator, length: float, depth: float, height: float, texture: int) -> MeshBuilder:
    x, y = length / 2, depth / 2
    wall = _WALLS[rng.integers(len(_WALLS))]
    roof = ((90, 95, 100), (70, 80, 120))[rng.integers(2)]
    corners = [(-x, -y), (x, -y), (x, y), (-x, y)]
    faces: list = []
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        faces.append([(ax, ay, height), (bx, by, height), (bx, by, 0.0), (ax, ay, 0.0)])
    faces.append([(cx, cy, height) for cx, cy in corners])
    faces.append([(cx, cy, 0.0) for cx, cy in corners])
    builder = MeshBuilder()
    builder.polyhedron(faces, [wall] * 4 + [roof] * 2, [texture] * 4 + [-1] * 2)
    return builder


def _tree(rng: np.random.Generator) -> MeshBuilder:
    builder = MeshBuilder()
    trunk, radius = rng.uniform(1.8, 3.0), rng.uniform(1.2, 2.2)
    builder.lathe([(0.0, 0.16), (trunk + 0.5, 0.1)], (45, 62, 82), sides=6)
    for _ in range(2):
        x, y = rng.uniform(-0.4, 0.4, 2) * radius
        r, z = radius * rng.uniform(0.7, 1.0), trunk + rng.uniform(0, 1.2)
        angles = np.linspace(-1.3, 1.35, 5)
        rings = [(z + r + r * 1.1 * np.sin(a), r * np.cos(a)) for a in angles]
        base = np.array([rng.uniform(28, 45), rng.uniform(72, 110), rng.uniform(42, 72)])
        bands = [tuple((base * (0.7 + 0.1 * i) * rng.uniform(0.9, 1.1)).tolist()) for i in range(4)]
        builder.lathe(rings, bands, centre=(float(x), float(y)), sides=8)
    return builder


def _hedge(rng: np.random.Generator) -> MeshBuilder:
    builder = MeshBuilder()
    half, height = rng.uniform(1.2, 2.5), rng.uniform(0.8, 1.4)
    green = (38.0, rng.uniform(70, 95), 48.0)
    builder.box((-half, half), (-0.4, 0.4), (0.0, height), {"side": green, "top": (45.0, 115.0, 65.0)})
    return builder


def _lamp_post(towards: int) -> MeshBuilder:
    builder = MeshBuilder()
    builder.lathe([(0.0, 0.1), (7.5, 0.06)], (120, 122, 122), sides=6)
    y = sorted((0.0, towards * 2.2))
    builder.box((-0.05, 0.05), (y[0], y[1]), (7.4, 7.52), (120, 122, 122))
    tip = sorted((towards * 1.6, towards * 2.3))
    builder.box((-0.14, 0.14), (tip[0], tip[1]), (7.32, 7.42), (205, 215, 215))
    return builder


def _facade(rng: np.random.Generator, width_m: float, storeys: int) -> NDArray[np.uint8]:
    """A wall with rows of windows, (H, W, 3)."""
    wall = np.asarray(_WALLS[rng.integers(len(_WALLS))], np.float64) * rng.uniform(0.85, 1.1)
    height, width = int(storeys * STOREY_M * _TEXELS_PER_M), int(width_m * _TEXELS_PER_M)
    coarse = rng.normal(0, 5, (max(height // 12, 2), max(width // 12, 2))).astype(np.float32)
    grain = cv2.resize(coarse, (width, height)) + rng.normal(0, 3, (height, width)).astype(np.float32)
    image = (wall + grain[..., None]).clip(0, 255).astype(np.uint8)
    columns = max(int(width_m / 3.2), 2)
    pitch = width / columns
    margin, tall = rng.uniform(0.15, 0.25) * pitch, rng.uniform(0.45, 0.6)
    for floor in range(storeys):
        top = height - (floor + 1) * STOREY_M * _TEXELS_PER_M
        shop = floor == 0 and rng.random() < 0.6
        for column in range(columns):
            shade = rng.uniform(0.55, 1.25)
            glass = tuple((np.array([95, 82, 70]) * shade).tolist())
            left, right = column * pitch + margin, (column + 1) * pitch - margin
            upper = top + (0.25 if shop else (1 - tall) * 0.45) * STOREY_M * _TEXELS_PER_M
            lower = top + (0.98 if shop else 0.45 + tall * 0.55) * STOREY_M * _TEXELS_PER_M
            corners = (int(left), int(upper)), (int(right), int(lower))
            cv2.rectangle(image, *corners, glass, -1)
            cv2.rectangle(image, *corners, (wall * 0.7).tolist(), 1)
        cv2.line(image, (0, int(top)), (width, int(top)), (wall * 0.8).tolist(), 1)
    return image
