"""A closed road through town, in coordinates along and across it."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

LANE_WIDTH_M = 3.5
ROAD_EDGES_M = {"lanes": 7.0, "bike": 8.5, "kerb": 11.2, "sidewalk": 15.5}
"""Half widths: end of the lanes, of the bicycle lane, of the parking strip, of the pavement."""


class Road:
    """A smooth closed centre line, run through counter-clockwise.

    A place is (s, d): s metres along the centre line, d metres to its left. Lanes are lines of constant d.

    Attributes:
        length_m: Length of the centre line.
        centre: (2,) middle of the loop in the global frame.
    """

    def __init__(self, rng: np.random.Generator, centre: ArrayLike, mean_radius_m: float = 100.0) -> None:
        self.centre = np.asarray(centre, np.float64)
        angle = np.linspace(0, 2 * np.pi, 4097)
        radius = np.ones_like(angle)
        for order, amplitude in ((2, 0.12), (3, 0.06), (4, 0.03)):
            radius += rng.uniform(0.3, 1) * amplitude * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
        points = mean_radius_m * radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
        steps = np.diff(points, axis=0)
        self._s = np.concatenate([[0.0], np.cumsum(np.linalg.norm(steps, axis=1))])
        self._points = points + self.centre
        heading = np.arctan2(np.gradient(points[:, 1], angle), np.gradient(points[:, 0], angle))
        self._heading = np.unwrap(heading)
        # The end of the loop is its start: gradients at the two ends are one-sided and would differ.
        self._heading[-1] = self._heading[0] + 2 * np.pi
        self.length_m = float(self._s[-1])

    def pose(self, s: ArrayLike, d: ArrayLike) -> tuple[NDArray, NDArray, NDArray]:
        """Global x, y (metres) and heading (radians) of places; s may exceed the length."""
        s = np.mod(np.asarray(s, np.float64), self.length_m)
        heading = np.interp(s, self._s, self._heading)
        x = np.interp(s, self._s, self._points[:, 0]) - np.asarray(d) * np.sin(heading)
        y = np.interp(s, self._s, self._points[:, 1]) + np.asarray(d) * np.cos(heading)
        return x, y, heading

    def line(self, d: float, step_m: float = 1.0) -> NDArray[np.float64]:
        """(n, 2) points of the closed line at distance ``d`` from the centre line."""
        x, y, _ = self.pose(np.arange(0, self.length_m, step_m), d)
        return np.stack([x, y], 1)
