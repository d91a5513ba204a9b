"""Names and orders that nuScenes, MMDetection3D and StreamPETR each fix."""

from __future__ import annotations

CAMERAS: tuple[str, ...] = (
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_FRONT_LEFT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_BACK_RIGHT",
)
"""StreamPETR's camera order; the official weights depend on it."""

LIDAR = "LIDAR_TOP"

INFO_CLASSES: tuple[str, ...] = (
    "car",
    "truck",
    "trailer",
    "bus",
    "construction_vehicle",
    "bicycle",
    "motorcycle",
    "pedestrian",
    "traffic_cone",
    "barrier",
)
"""Label order inside MMDetection3D's info files (``NuScenesDataset.METAINFO``), not the model's order."""

INFO_ATTRIBUTES: tuple[str, ...] = (
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.moving",
    "pedestrian.standing",
    "pedestrian.sitting_lying_down",
    "vehicle.moving",
    "vehicle.parked",
    "vehicle.stopped",
    "None",
)
"""Order of ``attr_label`` inside MMDetection3D's info files."""
