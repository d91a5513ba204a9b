"""What each part of a model COSTS: measured latency tables and the end-to-end prediction.

`LatencyTable`, `LatencyModel` and the sampling need numpy only; a backend is imported when it is used.
"""

from mdp_mmdet3d.latency.predict import LatencyModel, Measured
from mdp_mmdet3d.latency.sampling import entries_of, exact_points, grid_points
from mdp_mmdet3d.latency.table import (
    Device,
    Entry,
    LatencyTable,
    Lookup,
    MeasurementProtocol,
    NotMeasuredError,
)

__all__ = [
    "Device",
    "Entry",
    "LatencyModel",
    "LatencyTable",
    "Lookup",
    "Measured",
    "MeasurementProtocol",
    "NotMeasuredError",
    "entries_of",
    "exact_points",
    "grid_points",
]
