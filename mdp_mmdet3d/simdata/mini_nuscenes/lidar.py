"""A spinning 32-beam lidar: rays against the ground and convex solids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BEAMS = 32
COLUMNS = 1084
RANGE_M = 100.0
RANGE_NOISE_M = 0.01
_ELEVATION_DEG = (-30.67, 10.67)
_GROUND_INTENSITY = 12.0


@dataclass(frozen=True)
class SolidThing:
    """A thing that stops rays, in the global frame.

    Attributes:
        centre: (3,) a point within.
        reach_m: Radius around the centre that holds all of it.
        solids: (S, P, 4) half spaces ``n . x <= d`` as (n, d) of its convex parts.
        intensities: (S,) reflectivity, 0 to 255.
    """

    centre: NDArray[np.float64]
    reach_m: float
    solids: NDArray[np.float64]
    intensities: NDArray[np.float64]


def beam_directions() -> NDArray[np.float64]:
    """(BEAMS, COLUMNS, 3) unit vectors in the lidar frame; column 0 looks along x, then counter-clockwise."""
    elevation = np.radians(np.linspace(*_ELEVATION_DEG, BEAMS))[:, None]
    azimuth = (np.arange(COLUMNS) * 2 * np.pi / COLUMNS)[None]
    return np.stack(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation) + 0 * azimuth], -1
    )


def scan(things: list[SolidThing], lidar2global: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float32]:
    """One sweep.

    Args:
        things: What stands around; things beyond the range are ignored.
        lidar2global: (4, 4) pose of the lidar.
        rng: Source of the range noise.

    Returns:
        (n, 5) float32: x, y, z (metres, lidar frame), intensity (0 to 255) and beam of every return.
    """
    rotation, origin = lidar2global[:3, :3], lidar2global[:3, 3]
    directions = beam_directions()
    fall = directions @ rotation[2]
    with np.errstate(divide="ignore"):
        ranges = np.where(fall < 0, -origin[2] / fall, np.inf)
    intensity = np.full(ranges.shape, _GROUND_INTENSITY)
    for thing in things:
        centre = (thing.centre - origin) @ rotation
        columns = _columns_towards(centre, thing.reach_m)
        if columns is None:
            continue
        normals = thing.solids[..., :3] @ rotation
        offsets = thing.solids[..., 3] - thing.solids[..., :3] @ origin
        distance, part = _first_hit(directions[:, columns], normals, offsets)
        nearer = distance < ranges[:, columns]
        ranges[:, columns] = np.where(nearer, distance, ranges[:, columns])
        intensity[:, columns] = np.where(nearer, thing.intensities[part], intensity[:, columns])
    returned = ranges < RANGE_M
    measured = ranges[returned] + rng.normal(0, RANGE_NOISE_M, int(returned.sum()))
    beams = np.broadcast_to(np.arange(BEAMS)[:, None], ranges.shape)[returned]
    points = directions[returned] * measured[:, None]
    return np.column_stack([points, np.round(intensity[returned]), beams]).astype(np.float32)


def count_points_in_box(
    points: NDArray[np.float64], centre: NDArray[np.float64], size_m: tuple[float, float, float], yaw: float
) -> int:
    """How many points (n, 3) lie in an upright box of width, length, height around its gravity centre."""
    width, length, height = size_m
    delta = points - centre
    near = delta[np.abs(delta).max(1) <= max(size_m)]
    cos, sin = np.cos(yaw), np.sin(yaw)
    along, across = near[:, 0] * cos + near[:, 1] * sin, near[:, 1] * cos - near[:, 0] * sin
    inside = (np.abs(along) <= length / 2) & (np.abs(across) <= width / 2) & (np.abs(near[:, 2]) <= height / 2)
    return int(inside.sum())


def _columns_towards(centre: NDArray[np.float64], reach_m: float) -> NDArray[np.int64] | None:
    """Columns of the sweep that may meet a ball, None if it is out of range."""
    distance = float(np.hypot(centre[0], centre[1]))
    if distance - reach_m > RANGE_M:
        return None
    if distance <= reach_m:
        return np.arange(COLUMNS)
    half = np.arcsin(reach_m / distance)
    middle = np.arctan2(centre[1], centre[0])
    step = 2 * np.pi / COLUMNS
    return np.arange(int(np.ceil((middle - half) / step)), int(np.floor((middle + half) / step)) + 1) % COLUMNS


def _first_hit(
    directions: NDArray[np.float64], normals: NDArray[np.float64], offsets: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distance to the nearest of several convex solids and which one it is; inf where none is met.

    Args:
        directions: (B, C, 3) rays from the origin.
        normals: (S, P, 3).
        offsets: (S, P).
    """
    rays = directions.reshape(-1, 3)
    speed = normals @ rays.T
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = offsets[..., None] / speed
    entry = np.where(speed < 0, crossing, -np.inf).max(1)
    leaving = np.where(speed > 0, crossing, np.inf).min(1)
    # A ray along a face that lies on the wrong side of it misses.
    missed = ((speed == 0) & (offsets[..., None] < 0)).any(1)
    distance = np.where((entry > 0) & (entry <= leaving) & ~missed, entry, np.inf)
    part = distance.argmin(0)
    shape = directions.shape[:2]
    return np.take_along_axis(distance, part[None], 0)[0].reshape(shape), part.reshape(shape)
