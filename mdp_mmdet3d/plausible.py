"""What poses, times and camera matrices of a drive can be: each check says in words what is wrong, or None.

Numbers that a sensor cannot have given (a NaN, microseconds taken for seconds, a jump of 100 km) make a detector blind
without an error. Numpy only: the vehicle's runtime and the data sets share these rules.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np

LATEST_S = 1e11
"""Seconds since 1970 of the year 5138; milliseconds, micro- and nanoseconds of today lie above."""
LARGEST_GAP_S = 60.0
"""Two frames of one scene are closer; relative times in milliseconds step by more."""
FASTEST_M_PER_S = 150.0
SLACK_M = 5.0
"""By which a pose may be corrected between two frames on top of the motion."""
RIGID_TOLERANCE = 1e-2


def time_fault(seconds: Any) -> str | None:
    """What is wrong with a time stamp in seconds."""
    if isinstance(seconds, bool) or not isinstance(seconds, (Real, np.number)):
        return f"is {seconds!r}, not a number of seconds"
    value = float(seconds)
    if not math.isfinite(value):
        return f"is {seconds}, not a number of seconds"
    if abs(value) > LATEST_S:
        unit = next(name for limit, name in _UNITS if abs(value) >= limit)
        return f"is {seconds!r}: seconds are expected, this looks like {unit}"
    return None


_UNITS = ((1e17, "nanoseconds"), (1e14, "microseconds"), (0.0, "milliseconds"))


def pose_fault(matrix: Any) -> str | None:
    """What is wrong with a rigid (4, 4) transform."""
    matrix = as_numbers(matrix)
    if matrix is None or matrix.shape != (4, 4):
        return f"must be a rigid (4, 4) transform, got {_shape(matrix)}"
    if not np.isfinite(matrix).all():
        return "must be a rigid (4, 4) transform, but holds NaN or infinity"
    rotation = matrix[:3, :3]
    deviation = float(np.abs(rotation @ rotation.T - np.eye(3)).max())
    if deviation > RIGID_TOLERANCE or np.linalg.det(rotation) < 0 or not np.allclose(matrix[3], [0, 0, 0, 1]):
        return (
            f"must be a rigid (4, 4) transform; its rotation is off by {deviation:.3g}, with determinant "
            f"{np.linalg.det(rotation):.3g}, above the last row {matrix[3].tolist()}"
        )
    return None


def step_fault(before: np.ndarray, pose: np.ndarray, elapsed_s: float) -> str | None:
    """What is wrong with the way between two frames of one scene.

    Args:
        before: (4, 4) pose of the earlier frame.
        pose: (4, 4) pose of the later one.
        elapsed_s: Seconds between them, positive.
    """
    if elapsed_s > LARGEST_GAP_S:
        return (
            f"the time stamp advances by {elapsed_s:.6g} s inside a scene, {LARGEST_GAP_S:g} s are the most "
            "(time stamps must be seconds)"
        )
    way_m = float(np.linalg.norm(pose[:3, 3] - before[:3, 3]))
    if way_m > FASTEST_M_PER_S * elapsed_s + SLACK_M:
        return (
            f"ego_pose jumps by {way_m:.6g} m in {elapsed_s:.3g} s; faster than {FASTEST_M_PER_S:g} m/s is no vehicle"
        )
    return None


def intrinsics_fault(matrix: Any) -> str | None:
    """What is wrong with a camera matrix, (3, 3) or padded to (4, 4)."""
    matrix = as_numbers(matrix)
    if matrix is None or matrix.shape not in ((3, 3), (4, 4)):
        return f"must be a (3, 3) or (4, 4) camera matrix, got {_shape(matrix)}"
    if not np.isfinite(matrix).all():
        return "holds NaN or infinity"
    if min(matrix[0, 0], matrix[1, 1]) <= 0:
        return f"has the focal lengths {matrix[0, 0]:g} and {matrix[1, 1]:g} pixels; both must be positive"
    if not np.allclose(matrix[2, :3], [0, 0, 1]):
        return f"has the third row {matrix[2].tolist()}, not 0, 0, 1"
    return None


def projection_fault(lidar2img: np.ndarray, intrinsics: np.ndarray) -> str | None:
    """What is wrong with a (4, 4) matrix pixels <- lidar of a camera whose intrinsics are right."""
    if not np.isfinite(lidar2img).all():
        return "holds NaN or infinity"
    fault = pose_fault(np.linalg.solve(intrinsics, lidar2img))
    return None if fault is None else f"is not intrinsics @ lidar2cam with a rigid lidar2cam ({fault})"


def as_numbers(value: Any) -> np.ndarray | None:
    """As a float64 array; None where it holds something else than numbers."""
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError):
        return None


def _shape(matrix: np.ndarray | None) -> str:
    return "no numbers" if matrix is None else f"shape {matrix.shape}"
