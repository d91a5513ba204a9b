"""What each part of a model COSTS: measured latency tables and the end-to-end prediction.

`LatencyTable`, `LatencyModel` and the sampling need numpy only; a backend is imported when it is used.
"""

from mdp_mmdet3d.latency.predict import LatencyModel, MeasuredNetwork
from mdp_mmdet3d.latency.sampling import entries_of, exact_entries, grid_entries
from mdp_mmdet3d.latency.structures import (
    Structure,
    dense_structure,
    fit_structures,
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
    "MeasuredNetwork",
    "MeasurementProtocol",
    "NotMeasuredError",
    "Structure",
    "dense_structure",
    "entries_of",
    "exact_entries",
    "fit_structures",
    "grid_entries",
    "random_structure",
    "smallest_structure",
]
