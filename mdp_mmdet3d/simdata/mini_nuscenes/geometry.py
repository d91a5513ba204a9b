"""Rotations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pyquaternion import Quaternion


def rotation_matrix(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> NDArray[np.float64]:
    """(3, 3) rotation by roll about x, then pitch about y, then yaw about z, in radians."""
    (cy, cp, cr), (sy, sp, sr) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    return (
        np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
        @ np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
        @ np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    )


def quaternion(rotation: NDArray[np.float64]) -> list[float]:
    """[w, x, y, z] of a (3, 3) rotation."""
    return Quaternion(matrix=rotation, rtol=1e-6, atol=1e-8).elements.tolist()


def placed(polygons: NDArray[np.float64], pose: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (..., 3) of an upright object moved to ``pose`` = (x, y, z, yaw)."""
    return polygons @ rotation_matrix(float(pose[3])).T + pose[:3]
