"""The ten classes: names in the data set, sizes, how often they occur, and where in a street they belong."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectClass:
    """What there is to know about a class of objects.

    Attributes:
        name: Detection class.
        category: Name in nuScenes' category table.
        size_m: Mean width, length, height (nuScenes order).
        weight: Relative frequency.
        tracks: Kinds of tracks it may occupy, with probabilities.
        group: How many stand together, e.g. the cones of one work zone.
        gap_m: Free space kept around it along the road.
        towed_by: Class that pulls it when it is in a lane.
    """

    name: str
    category: str
    size_m: tuple[float, float, float]
    weight: float
    tracks: dict[str, float]
    group: int = 1
    gap_m: float = 3.0
    towed_by: str = ""


CATALOGUE: dict[str, ObjectClass] = {
    item.name: item
    for item in (
        ObjectClass("car", "vehicle.car", (1.95, 4.62, 1.73), 0.28, {"lane": 0.6, "parking": 0.4}),
        ObjectClass("truck", "vehicle.truck", (2.51, 6.93, 2.84), 0.06, {"lane": 0.7, "parking": 0.3}),
        ObjectClass(
            "construction_vehicle", "vehicle.construction", (2.73, 6.37, 3.19), 0.03, {"parking": 0.8, "lane": 0.2}
        ),
        ObjectClass("bus", "vehicle.bus.rigid", (2.94, 11.0, 3.47), 0.04, {"lane": 0.8, "parking": 0.2}),
        ObjectClass(
            "trailer", "vehicle.trailer", (2.87, 9.0, 3.6), 0.04, {"lane": 0.6, "parking": 0.4}, towed_by="truck"
        ),
        ObjectClass("barrier", "movable_object.barrier", (2.53, 0.5, 0.98), 0.12, {"parking": 1.0}, 4, 0.8),
        ObjectClass("motorcycle", "vehicle.motorcycle", (0.77, 2.11, 1.47), 0.05, {"lane": 0.6, "parking": 0.4}),
        ObjectClass("bicycle", "vehicle.bicycle", (0.60, 1.70, 1.28), 0.06, {"bike": 0.7, "kerb": 0.3}, 1, 1.0),
        ObjectClass(
            "pedestrian", "human.pedestrian.adult", (0.67, 0.73, 1.77), 0.22, {"sidewalk": 0.85, "kerb": 0.15}, 1, 0.6
        ),
        ObjectClass("traffic_cone", "movable_object.trafficcone", (0.41, 0.41, 0.9), 0.10, {"parking": 1.0}, 4, 1.2),
    )
}

PEDESTRIAN_CATEGORIES: tuple[tuple[str, float, float], ...] = (
    ("human.pedestrian.adult", 0.8, 1.0),
    ("human.pedestrian.child", 0.1, 0.72),
    ("human.pedestrian.construction_worker", 0.07, 1.0),
    ("human.pedestrian.police_officer", 0.03, 1.02),
)
"""Category, share and height factor."""

VEHICLES = frozenset({"car", "truck", "construction_vehicle", "bus", "trailer"})
CYCLES = frozenset({"motorcycle", "bicycle"})

CATEGORIES: tuple[str, ...] = (
    "human.pedestrian.adult",
    "human.pedestrian.child",
    "human.pedestrian.wheelchair",
    "human.pedestrian.stroller",
    "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer",
    "human.pedestrian.construction_worker",
    "animal",
    "vehicle.car",
    "vehicle.motorcycle",
    "vehicle.bicycle",
    "vehicle.bus.bendy",
    "vehicle.bus.rigid",
    "vehicle.truck",
    "vehicle.construction",
    "vehicle.emergency.ambulance",
    "vehicle.emergency.police",
    "vehicle.trailer",
    "movable_object.barrier",
    "movable_object.trafficcone",
    "movable_object.pushable_pullable",
    "movable_object.debris",
    "static_object.bicycle_rack",
)
"""All rows of nuScenes' category table."""

ATTRIBUTES: tuple[str, ...] = (
    "vehicle.moving",
    "vehicle.stopped",
    "vehicle.parked",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "pedestrian.moving",
)
"""All rows of nuScenes' attribute table."""
