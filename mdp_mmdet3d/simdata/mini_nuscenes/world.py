"""Who is where and when: objects that share the road without touching, and the vehicle that carries the sensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.simdata.mini_nuscenes.catalogue import (
    CATALOGUE,
    CYCLES,
    PEDESTRIAN_CATEGORIES,
    VEHICLES,
    ObjectClass,
)
from mdp_mmdet3d.simdata.mini_nuscenes.geometry import rotation_matrix
from mdp_mmdet3d.simdata.mini_nuscenes.mesh import Mesh
from mdp_mmdet3d.simdata.mini_nuscenes.road import Road
from mdp_mmdet3d.simdata.mini_nuscenes.shapes import cuboid_mesh, object_mesh
from mdp_mmdet3d.simdata.mini_nuscenes.spec import MiniNuScenesSpec

EGO_LENGTH_M = 5.5
EGO_LATERAL_M = -1.75
_TOW_BAR_M = 0.8


@dataclass(frozen=True)
class Track:
    """A line along the road on which everybody moves alike, so that distances between them stay.

    Attributes:
        kind: Which objects belong here.
        lateral_m: Metres to the left of the centre line.
        speed_mps: Mean speed along the road, negative against it.
        wobble_m: Amplitude of the periodic lead and lag.
        period_s: Its period.
        stopped: Whether this is a queue in a lane.
    """

    kind: str
    lateral_m: float
    speed_mps: float = 0.0
    wobble_m: float = 0.0
    period_s: float = 12.0
    stopped: bool = False

    def travel(self, time_s: float) -> float:
        """Metres moved along the road after ``time_s`` seconds."""
        return self.speed_mps * time_s + self.wobble_m * np.sin(2 * np.pi * time_s / self.period_s)


@dataclass(frozen=True)
class WorldObject:
    """An object of the town.

    Attributes:
        index: Position in the world's list.
        kind: Its class.
        category: nuScenes category.
        attribute: nuScenes attribute, empty for cones and barriers.
        size_m: Width, length, height.
        track: The line it moves on.
        start_m: Place along the road at time 0.
        lateral_m: Metres to the left of the centre line.
        heading: Angle to the direction of the road, radians.
        make_mesh: Builds its looks.
    """

    index: int
    kind: ObjectClass
    category: str
    attribute: str
    size_m: tuple[float, float, float]
    track: Track
    start_m: float
    lateral_m: float
    heading: float
    make_mesh: Callable[[], Mesh]

    @cached_property
    def mesh(self) -> Mesh:
        """Its looks, built when it first comes into sight."""
        return self.make_mesh()


class World:
    """One scene: a road, the objects on it and the path of the vehicle.

    Args:
        spec: What is wanted.
        scene: Number of the scene.
        centre: (x, y) of the middle of the loop in the global frame.

    Raises:
        MdpError: More objects are wanted than fit.
    """

    def __init__(self, spec: MiniNuScenesSpec, scene: int, centre: tuple[float, float]) -> None:
        rng = np.random.default_rng([spec.seed, scene, 1])
        self.spec = spec
        self.road = Road(rng, centre)
        self._tilt_phase = rng.uniform(0, 2 * np.pi, 2)
        self._tracks = _tracks(rng)
        self._ego_track = self._tracks[0]
        self._taken: dict[int, list[tuple[float, float]]] = {i: [] for i in range(len(self._tracks))}
        self._taken[0].append((-EGO_LENGTH_M, EGO_LENGTH_M))
        self.objects: list[WorldObject] = []
        self._populate(rng)

    def ego_pose(self, time_s: float) -> NDArray[np.float64]:
        """(4, 4) vehicle to global. The vehicle pitches and rolls a little on its springs."""
        x, y, yaw = self.road.pose(self._ego_track.travel(time_s), EGO_LATERAL_M)
        pitch, roll = np.radians(0.25) * np.sin(2 * np.pi * time_s / np.array([3.1, 4.3]) + self._tilt_phase)
        pose = np.eye(4)
        pose[:3, :3] = rotation_matrix(float(yaw), float(pitch), float(roll))
        pose[:2, 3] = x, y
        return pose

    def object_poses(self, time_s: float) -> NDArray[np.float64]:
        """(n, 4) x, y on the ground, yaw and unused z = 0 of all objects: columns x, y, z, yaw."""
        travel = {id(track): track.travel(time_s) for track in self._tracks}
        s = np.array([item.start_m + travel[id(item.track)] for item in self.objects])
        x, y, heading = self.road.pose(s, np.array([item.lateral_m for item in self.objects]))
        yaw = heading + np.array([item.heading for item in self.objects])
        return np.stack([x, y, np.zeros_like(x), np.mod(yaw + np.pi, 2 * np.pi) - np.pi], 1)

    def _populate(self, rng: np.random.Generator) -> None:
        """Spread every class evenly around the loop, the first of each close to the vehicle's start."""
        total = self.spec.object_count * self.road.length_m / (2 * self.spec.radius_m)
        weights = sum(CATALOGUE[name].weight for name in self.spec.classes)
        # What has only one place to be comes first, then long vehicles: small things fit into what is left.
        kinds = [CATALOGUE[name] for name in self.spec.classes]
        for kind in sorted(kinds, key=lambda kind: (len(kind.tracks), -kind.size_m[1])):
            groups = max(1, round(total * kind.weight / weights / kind.group))
            spacing = self.road.length_m / groups
            first = rng.uniform(8, 20)
            for i in range(groups):
                self._add_group(kind, first + i * spacing + (i > 0) * rng.uniform(-0.3, 0.3) * spacing, rng)

    def _add_group(self, kind: ObjectClass, wanted_m: float, rng: np.random.Generator) -> None:
        """Find room for a group, or for a trailer and the truck that pulls it, and put it there."""
        kinds = [kind] * kind.group
        tracks = [list(kind.tracks)[i] for i in _shuffled(rng, list(kind.tracks.values()))]
        gap = kind.gap_m
        if kind.towed_by in self.spec.classes and tracks[0] == "lane":
            kinds, tracks, gap = [kind, CATALOGUE[kind.towed_by]], ["lane"], _TOW_BAR_M
        sizes = [_varied(member.size_m, rng) for member in kinds]
        # A barrier stands along the road: its width is what it takes of the road's length.
        extents = [size[0] if kind.name == "barrier" else size[1] for size in sizes]
        needed = sum(extents) + gap * (len(kinds) - 1)
        place = self._free_place(tracks, wanted_m, needed, kind.gap_m, rng)
        if place is None:
            raise MdpError(
                f"{self.spec.object_count} objects within {self.spec.radius_m} m do not fit on the road "
                f"(no room for a {kind.name}); lower object_count or raise radius_m"
            )
        track_index, cursor = place
        track = self._tracks[track_index]
        self._taken[track_index].append((cursor - kind.gap_m / 2, cursor + needed + kind.gap_m / 2))
        members = list(zip(kinds, sizes, extents))
        for member, size, extent in members if track.lateral_m < 0 else members[::-1]:
            self._add(member, size, track, cursor + extent / 2, rng)
            cursor += extent + gap

    def _free_place(
        self, kinds: list[str], wanted_m: float, needed_m: float, gap_m: float, rng: np.random.Generator
    ) -> tuple[int, float] | None:
        """(track, start) of the free stretch closest to the wanted one on the first kind of track that has any."""
        offsets = np.arange(0, self.road.length_m / 2, 0.5)
        offsets = np.stack([offsets, -offsets], 1).ravel()
        for kind in kinds:
            found = []
            for index in rng.permutation([i for i, track in enumerate(self._tracks) if track.kind == kind]).tolist():
                free = self._are_free(index, wanted_m + offsets, needed_m, gap_m)
                if free.any():
                    offset = float(offsets[free.argmax()])
                    # Coarse distances: among tracks that are about as close, the permutation decides.
                    found.append((abs(offset) // 5, index, wanted_m + offset))
            if found:
                _, index, start = min(found, key=lambda item: item[0])
                return index, start
        return None

    def _are_free(self, track: int, starts: NDArray[np.float64], needed_m: float, gap_m: float) -> NDArray[np.bool_]:
        """(n,) whether nothing is on the track from each start over ``needed_m`` and half a gap on either side."""
        if not self._taken[track]:
            return np.full(len(starts), needed_m + gap_m <= self.road.length_m)
        low, high = np.array(self._taken[track]).T
        behind = np.mod(starts[:, None] - gap_m / 2 - low, self.road.length_m)
        return ((behind >= high - low) & (behind + needed_m + gap_m <= self.road.length_m)).all(1)

    def _add(
        self,
        kind: ObjectClass,
        size_m: tuple[float, float, float],
        track: Track,
        start_m: float,
        rng: np.random.Generator,
    ) -> None:
        category = kind.category
        if kind.name == "pedestrian":
            choice = rng.choice(len(PEDESTRIAN_CATEGORIES), p=[share for _, share, _ in PEDESTRIAN_CATEGORIES])
            category, _, factor = PEDESTRIAN_CATEGORIES[choice]
            size_m = (size_m[0], size_m[1], size_m[2] * factor)
        moving = track.speed_mps != 0
        against = track.speed_mps < 0 or (not moving and track.lateral_m > 0)
        heading = np.pi if against else 0.0
        if kind.name == "barrier":
            heading += np.pi / 2
        elif kind.name in ("pedestrian", "traffic_cone") and not moving:
            heading = rng.uniform(-np.pi, np.pi)
        rider = kind.name in CYCLES and track.kind != "kerb" and (moving or track.stopped)
        colours = np.random.default_rng(rng.integers(2**32))
        worker = category.endswith("construction_worker")
        make_mesh = (
            partial(cuboid_mesh, kind.name, size_m)
            if self.spec.cuboids
            else partial(object_mesh, kind.name, size_m, colours, rider, worker)
        )
        wander = 0.15 if kind.name in ("car", "pedestrian", "motorcycle") else 0.0
        self.objects.append(
            WorldObject(
                index=len(self.objects),
                kind=kind,
                category=category,
                attribute=_attribute(kind.name, track, rider),
                size_m=size_m,
                track=track,
                start_m=start_m,
                lateral_m=track.lateral_m + rng.uniform(-wander, wander),
                heading=heading,
                make_mesh=make_mesh,
            )
        )


def _tracks(rng: np.random.Generator) -> list[Track]:
    """The lines of one road; the first is the lane of the vehicle with the sensors."""
    jam = rng.random() < 0.3
    lanes = [
        Track("lane", EGO_LATERAL_M, rng.uniform(6, 9), rng.uniform(2, 5)),
        Track("lane", -5.25, rng.uniform(4, 8), 2.0, 9.0),
        Track("lane", 1.75, -rng.uniform(6, 10), 2.0, 11.0),
        Track("lane", 5.25, 0.0, stopped=True) if jam else Track("lane", 5.25, -rng.uniform(3, 7), 1.0, 8.0),
    ]
    sides = []
    for side in (-1, 1):
        sides += [
            Track("bike", side * 7.75, -side * rng.uniform(3.5, 5.5)),
            Track("parking", side * 9.85),
            Track("sidewalk", side * 12.2, rng.uniform(0.9, 1.5)),
            Track("sidewalk", side * 13.1, -rng.uniform(0.8, 1.4)),
            Track("sidewalk", side * 14.0, rng.uniform(0.5, 1.2)),
            Track("kerb", side * 14.9),
        ]
    return lanes + sides


def _shuffled(rng: np.random.Generator, shares: list[float]) -> list[int]:
    """All indices in random order, those with larger shares rather first."""
    return rng.choice(len(shares), size=len(shares), replace=False, p=shares).tolist()


def _varied(size_m: tuple[float, float, float], rng: np.random.Generator) -> tuple[float, float, float]:
    width, length, height = (np.asarray(size_m) * rng.uniform(0.92, 1.08, 3)).tolist()
    return width, length, height


def _attribute(name: str, track: Track, rider: bool) -> str:
    moving = track.speed_mps != 0
    if name in VEHICLES:
        return "vehicle.moving" if moving else "vehicle.stopped" if track.stopped else "vehicle.parked"
    if name in CYCLES:
        return "cycle.with_rider" if rider else "cycle.without_rider"
    if name == "pedestrian":
        return "pedestrian.moving" if moving else "pedestrian.standing"
    return ""
