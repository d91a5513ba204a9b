"""What each part of a model COSTS: measured latency tables and the end-to-end prediction.

`LatencyTable`, `LatencyModel` and the sampling need numpy only; a backend is imported when it is used.
"""

from mdp_mmdet3d.latency.predict import LatencyModel, Measured
from mdp_mmdet3d.latency.sampling import entries_of, exact_points, grid_points
from mdp_mmdet3d.latency.structures import (
    Structure,
    calibration_structures,
    dense_structure,
    random_structure,
    smallest_structure,
)
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
    "Structure",
    "calibration_structures",
    "dense_structure",
    "entries_of",
    "exact_points",
    "grid_points",
    "random_structure",
    "smallest_structure",
]
