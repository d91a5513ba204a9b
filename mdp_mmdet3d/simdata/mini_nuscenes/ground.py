"""The ground seen from above: road, markings, pavement and grass as an image; and the map mask of the devkit."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from mdp_mmdet3d.simdata.mini_nuscenes.road import LANE_WIDTH_M, ROAD_EDGES_M, Road

RESOLUTION_M = 0.1
_SHIFT = 4

ASPHALT = (92, 90, 88)
PARKING = (104, 103, 101)
PAVEMENT = (142, 148, 152)
GRASS = (62, 104, 88)
WHITE = (215, 218, 218)
YELLOW = (70, 175, 210)
KERB = (170, 172, 172)


@dataclass(frozen=True)
class Ground:
    """A top view of part of the ground.

    Attributes:
        image: (H, W, 3) BGR.
        coarse: The same, eight times smaller.
        image2world: (3, 3) pixel to global (x, y, 1).
        mean_colour: (3,) for what lies outside.
    """

    image: NDArray[np.uint8]
    coarse: NDArray[np.uint8]
    image2world: NDArray[np.float64]
    mean_colour: tuple[float, float, float]


def make_ground(rng: np.random.Generator, road: Road, low: NDArray, high: NDArray) -> Ground:
    """Paint the ground between two corners (x, y) in metres."""
    width, height = (np.ceil((high - low) / RESOLUTION_M / 8).astype(int) * 8).tolist()
    image = np.empty((height, width, 3), np.uint8)
    image[:] = GRASS

    def pixels(points: NDArray) -> NDArray[np.int32]:
        return np.round((points - low) / RESOLUTION_M * 2**_SHIFT).astype(np.int32)

    def fill_inside(d: float, colour: tuple[int, int, int]) -> None:
        cv2.fillPoly(image, [pixels(road.line(d))], colour, cv2.LINE_AA, _SHIFT)

    def stripe(d: float, colour: tuple[int, int, int], on_m: float = 0.0, off_m: float = 0.0) -> None:
        if off_m == 0:
            cv2.polylines(image, [pixels(road.line(d))], True, colour, 1, cv2.LINE_AA, _SHIFT)
            return
        for start in np.arange(0, road.length_m - on_m, on_m + off_m):
            x, y, _ = road.pose(np.linspace(start, start + on_m, 4), d)
            for shift in (-0.04, 0.04):
                line = pixels(np.stack([x, y], 1) + shift)
                cv2.polylines(image, [line], False, colour, 1, cv2.LINE_AA, _SHIFT)

    edge = ROAD_EDGES_M
    # The inside of the loop has positive d: paint from the outermost line inwards.
    for d, colour in (
        (-edge["sidewalk"], PAVEMENT),
        (-edge["kerb"] - 0.2, KERB),
        (-edge["kerb"], PARKING),
        (-edge["bike"], ASPHALT),
        (edge["bike"], PARKING),
        (edge["kerb"], KERB),
        (edge["kerb"] + 0.2, PAVEMENT),
        (edge["sidewalk"], GRASS),
    ):
        fill_inside(d, colour)
    for side in (-1, 1):
        stripe(side * edge["lanes"], WHITE)
        stripe(side * (edge["lanes"] - 0.08), WHITE)
        stripe(side * edge["bike"], WHITE, 0.6, 0.9)
        stripe(side * LANE_WIDTH_M, WHITE, 3.0, 6.0)
        for s in np.arange(0, road.length_m, 6.5):
            x, y, _ = road.pose(s, np.array([edge["bike"], edge["kerb"]]) * side)
            cv2.polylines(image, [pixels(np.stack([x, y], 1))], False, WHITE, 1, cv2.LINE_AA, _SHIFT)
        for s in np.arange(0, road.length_m, 2.0):
            x, y, _ = road.pose(s, np.array([edge["kerb"] + 0.2, edge["sidewalk"]]) * side)
            cv2.polylines(image, [pixels(np.stack([x, y], 1))], False, (122, 128, 131), 1, cv2.LINE_AA, _SHIFT)
    for d in (-0.15, -0.1, 0.1, 0.15):
        stripe(d, YELLOW)
    image = _weathered(rng, image)
    coarse = cv2.resize(image, (width // 8, height // 8), interpolation=cv2.INTER_AREA).astype(np.uint8)
    image2world = np.array([[RESOLUTION_M, 0, low[0]], [0, RESOLUTION_M, low[1]], [0, 0, 1]])
    blue, green, red = coarse.reshape(-1, 3).mean(0).tolist()
    return Ground(image, coarse, image2world, (blue, green, red))


def _weathered(rng: np.random.Generator, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image with stains of many sizes, patches of other asphalt and grain."""
    height, width = image.shape[:2]
    gain = np.zeros((height, width), np.float32)
    for cell, strength in ((150, 9), (40, 6), (8, 4)):
        noise = rng.normal(0, strength, (height // cell + 2, width // cell + 2)).astype(np.float32)
        gain += cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
    tile = rng.normal(0, 7, (256, 256)).astype(np.float32)
    gain += np.tile(tile, (height // 256 + 1, width // 256 + 1))[:height, :width]
    for _ in range(height * width // 60000):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        axes = int(rng.integers(4, 30)), int(rng.integers(4, 14))
        cv2.ellipse(gain, (x, y), axes, float(rng.uniform(0, 180)), 0, 360, [float(rng.normal(-6, 6))], -1)
    positive = gain.clip(0, 255).astype(np.uint8)
    negative = (-gain).clip(0, 255).astype(np.uint8)
    result = cv2.subtract(cv2.add(image, cv2.merge([positive] * 3)), cv2.merge([negative] * 3))
    return result.astype(np.uint8)


def map_mask(roads: list[Road], size_m: tuple[float, float]) -> NDArray[np.uint8]:
    """Roads and pavements as the devkit's semantic prior: 255 on them, 0 elsewhere.

    Args:
        roads: Loops of one place.
        size_m: Extent of the place along x and y; its lower left corner is the global origin.

    Returns:
        (H, W) at 0.1 m per pixel, the first row at the largest y.
    """
    width, height = (round(value / RESOLUTION_M) for value in size_m)
    mask = np.zeros((height, width), np.uint8)
    for road in roads:
        for d, value in ((-ROAD_EDGES_M["sidewalk"], 255), (ROAD_EDGES_M["sidewalk"], 0)):
            line = road.line(d) / RESOLUTION_M
            line[:, 1] = height - line[:, 1]
            cv2.fillPoly(mask, [np.round(line).astype(np.int32)], [value])
    return mask
