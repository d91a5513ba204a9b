"""One scene: simulate, render, scan, and fill the tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from mdp_mmdet3d.datasets.conventions import LIDAR
from mdp_mmdet3d.simdata.mini_nuscenes.backdrop import Backdrop
from mdp_mmdet3d.simdata.mini_nuscenes.geometry import placed, quaternion, rotation_matrix
from mdp_mmdet3d.simdata.mini_nuscenes.ground import make_ground
from mdp_mmdet3d.simdata.mini_nuscenes.lidar import SolidThing, count_points_in_box, scan
from mdp_mmdet3d.simdata.mini_nuscenes.render import PolygonSet, View, render
from mdp_mmdet3d.simdata.mini_nuscenes.rig import Camera, make_rig
from mdp_mmdet3d.simdata.mini_nuscenes.scenery import make_scenery
from mdp_mmdet3d.simdata.mini_nuscenes.spec import MiniNuScenesSpec
from mdp_mmdet3d.simdata.mini_nuscenes.tables import Tables, visibility_token
from mdp_mmdet3d.simdata.mini_nuscenes.world import World, WorldObject

KEY_FRAME_US = 500_000
JPEG_QUALITY = 92
_EPOCH_S = 1_532_402_927
_GROUND_MARGIN_M = 110.0
_SIGHT_M = 110.0


@dataclass(frozen=True)
class Drive:
    """Where and when a scene takes place.

    Attributes:
        index: Number of the scene.
        name: Official scene name.
        location: Official name of the place.
        centre: (x, y) of the middle of its road, metres.
    """

    index: int
    name: str
    location: str
    centre: tuple[float, float]

    @property
    def start_us(self) -> int:
        """Time of the first key frame."""
        return (_EPOCH_S + 3600 * self.index) * 1_000_000 + 647_951

    @property
    def logfile(self) -> str:
        """Name of the log, as nuScenes forms it."""
        local = datetime.fromtimestamp(self.start_us / 1e6, timezone(timedelta(hours=8)))
        return f"n{15 + self.index:03d}-{local:%Y-%m-%d-%H-%M-%S}+0800"


class SceneWriter:
    """Writes the files of one scene below ``root`` and its rows into ``tables``."""

    def __init__(self, spec: MiniNuScenesSpec, drive: Drive, tables: Tables, root: Path) -> None:
        self._spec, self._drive, self._tables, self._root = spec, drive, tables, root
        self.world = World(spec, drive.index, drive.centre)
        rng = np.random.default_rng([spec.seed, drive.index, 2])
        self._rng = rng
        self._rig = make_rig(rng, spec.image_size)
        self._scenery = make_scenery(rng, self.world.road)
        span_s = spec.frames * KEY_FRAME_US / 1e6
        path = np.array([self.world.ego_pose(t)[:2, 3] for t in np.arange(-0.5, span_s + 0.5, 0.5)])
        ground = make_ground(rng, self.world.road, path.min(0) - _GROUND_MARGIN_M, path.max(0) + _GROUND_MARGIN_M)
        self._backdrop = Backdrop(rng, ground)

    def write(self, log_token: str, step: Callable[[], None]) -> None:
        """Write all key frames.

        Args:
            log_token: Row of the log table.
            step: Called after every key frame.
        """
        tables, name = self._tables, self._drive.name
        calibrations = self._calibrate()
        samples = []
        timestamp_us = self._drive.start_us
        for frame in range(self._spec.frames):
            samples.append(self._write_frame(frame, timestamp_us, calibrations))
            timestamp_us += KEY_FRAME_US + int(self._rng.integers(-3000, 3001))
            step()
        tables.add(
            "scene",
            name,
            log_token=log_token,
            nbr_samples=len(samples),
            first_sample_token=samples[0],
            last_sample_token=samples[-1],
            name=name,
            description="Simulated town, loop road",
        )
        self._add_instances()

    def _calibrate(self) -> dict[str, str]:
        """Rows of the calibrated sensors; channel to token."""
        tables, rig = self._tables, self._rig
        mounts = [(camera.name, camera.cam2ego, camera.intrinsics.tolist()) for camera in rig.cameras]
        tokens = {}
        for channel, pose, intrinsics in [*mounts, (LIDAR, rig.lidar2ego, [])]:
            tokens[channel] = tables.add(
                "calibrated_sensor",
                f"{self._drive.name}/{channel}",
                sensor_token=tables.token("sensor", channel),
                translation=pose[:3, 3].tolist(),
                rotation=quaternion(pose[:3, :3]),
                camera_intrinsic=intrinsics,
            )
        return tokens

    def _write_frame(self, frame: int, timestamp_us: int, calibrations: dict[str, str]) -> str:
        tables, name = self._tables, self._drive.name
        sample = tables.add_linked(
            "sample", f"{name}/{frame}", name, timestamp=timestamp_us, scene_token=tables.token("scene", name)
        )
        shown: Counter[int] = Counter()
        silhouettes: Counter[int] = Counter()
        for camera in self._rig.cameras:
            fired_us = timestamp_us - camera.lead_us + int(self._rng.integers(-800, 801))
            view = self._photograph(camera, fired_us)
            shown.update(view.visible)
            silhouettes.update(view.silhouettes)
            path = self._add_data(sample, camera.name, fired_us, frame, calibrations, camera.image_size)
            # OpenCV and numpy would hide the disk's own error.
            path.write_bytes(cv2.imencode(".jpg", view.image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes())
        lidar2global = self._ego(timestamp_us) @ self._rig.lidar2ego
        points = scan(self._solid_things(timestamp_us), lidar2global, self._rng)
        self._add_data(sample, LIDAR, timestamp_us, frame, calibrations, (0, 0)).write_bytes(points.tobytes())
        self._annotate(sample, frame, timestamp_us, points, lidar2global, shown, silhouettes)
        return sample

    def _photograph(self, camera: Camera, fired_us: int) -> View:
        cam2global = self._ego(fired_us) @ camera.cam2ego
        eye = cam2global[:2, 3]
        parts: list[tuple[NDArray, NDArray, NDArray, int]] = []
        shadows = []
        for item, pose in self._in_sight(fired_us):
            parts.append((placed(item.mesh.polygons, pose), item.mesh.colours, item.mesh.textures, item.index))
            shadows.append(self._shadow(item, pose))
        scenery = self._scenery
        near = np.linalg.norm(scenery.positions - eye, axis=1) < 60 + 20 * scenery.reach_m
        for i in np.flatnonzero(near):
            mesh = scenery.meshes[i]
            parts.append((mesh.polygons, mesh.colours, mesh.textures, -1))
        polygons = PolygonSet(
            vertices=np.concatenate([part[0] for part in parts]),
            colours=np.concatenate([part[1] for part in parts]),
            textures=np.concatenate([part[2] for part in parts]),
            things=np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts]),
            owners=np.array([part[3] for part in parts]),
        )
        return render(camera, cam2global, polygons, self._backdrop, shadows, scenery.textures)

    def _shadow(self, item: WorldObject, pose: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, 2) outline of an object's shadow on the ground."""
        width, length, height = item.size_m
        corners = np.array([[x, y, 0] for x in (-length / 2, length / 2) for y in (-width / 2, width / 2)])
        foot = placed(corners, pose)[:, :2]
        sun = self._backdrop.sun
        tip = foot - sun[:2] / sun[2] * height * 0.8
        return cv2.convexHull(np.concatenate([foot, tip]).astype(np.float32))[:, 0].astype(np.float64)

    def _solid_things(self, timestamp_us: int) -> list[SolidThing]:
        things = []
        for item, pose in self._in_sight(timestamp_us):
            solids = item.mesh.solids.copy()
            solids[..., :3] = solids[..., :3] @ rotation_matrix(pose[3]).T
            solids[..., 3] += solids[..., :3] @ pose[:3]
            centre = pose[:3] + np.array([0, 0, item.size_m[2] / 2])
            things.append(SolidThing(centre, float(np.linalg.norm(item.size_m)) / 2, solids, item.mesh.intensities))
        for mesh, position, reach in zip(self._scenery.meshes, self._scenery.positions, self._scenery.reach_m):
            things.append(SolidThing(np.append(position, 0.0), float(reach), mesh.solids, mesh.intensities))
        return things

    def _annotate(
        self,
        sample: str,
        frame: int,
        timestamp_us: int,
        points: NDArray[np.float32],
        lidar2global: NDArray[np.float64],
        shown: Counter[int],
        silhouettes: Counter[int],
    ) -> None:
        tables, name = self._tables, self._drive.name
        cloud = points[:, :3].astype(np.float64) @ lidar2global[:3, :3].T + lidar2global[:3, 3]
        ego = self._ego(timestamp_us)[:2, 3]
        for item, pose in self._in_sight(timestamp_us):
            far = np.hypot(*(pose[:2] - ego)) > self._spec.radius_m
            if far or shown[item.index] < self._spec.min_visible_pixels:
                continue
            centre = pose[:3] + np.array([0, 0, item.size_m[2] / 2])
            instance = f"{name}/{item.index}"
            tables.add_linked(
                "sample_annotation",
                f"{instance}/{frame}",
                instance,
                sample_token=sample,
                instance_token=tables.token("instance", instance),
                visibility_token=visibility_token(shown[item.index], silhouettes[item.index]),
                attribute_tokens=[tables.token("attribute", item.attribute)] if item.attribute else [],
                translation=centre.tolist(),
                size=list(item.size_m),
                rotation=quaternion(rotation_matrix(pose[3])),
                num_lidar_pts=count_points_in_box(cloud, centre, item.size_m, float(pose[3])),
                num_radar_pts=0,
            )

    def _add_instances(self) -> None:
        """Rows of the objects that were annotated at least once."""
        tables = self._tables
        annotations: dict[str, list[str]] = {}
        for row in tables.rows("sample_annotation"):
            annotations.setdefault(row["instance_token"], []).append(row["token"])
        for item in self.world.objects:
            name = f"{self._drive.name}/{item.index}"
            found = annotations.get(tables.token("instance", name))
            if found:
                tables.add(
                    "instance",
                    name,
                    category_token=tables.token("category", item.category),
                    nbr_annotations=len(found),
                    first_annotation_token=found[0],
                    last_annotation_token=found[-1],
                )

    def _add_data(
        self,
        sample: str,
        channel: str,
        timestamp_us: int,
        frame: int,
        calibrations: dict[str, str],
        image_size: tuple[int, int],
    ) -> Path:
        """Rows of one sensor reading and its pose; returns where the file belongs."""
        tables = self._tables
        key = f"{self._drive.name}/{channel}/{frame}"
        pose = self._ego(timestamp_us)
        suffix, kind = (".pcd.bin", "pcd") if channel == LIDAR else (".jpg", "jpg")
        filename = f"samples/{channel}/{self._drive.logfile}__{channel}__{timestamp_us}{suffix}"
        ego_pose = tables.add(
            "ego_pose",
            key,
            timestamp=timestamp_us,
            rotation=quaternion(pose[:3, :3]),
            translation=pose[:3, 3].tolist(),
        )
        tables.add_linked(
            "sample_data",
            key,
            f"{self._drive.name}/{channel}",
            sample_token=sample,
            ego_pose_token=ego_pose,
            calibrated_sensor_token=calibrations[channel],
            timestamp=timestamp_us,
            fileformat=kind,
            is_key_frame=True,
            height=image_size[1],
            width=image_size[0],
            filename=filename,
        )
        return self._root / filename

    def _in_sight(self, timestamp_us: int) -> list[tuple[WorldObject, NDArray[np.float64]]]:
        """Objects not too far from the vehicle, with their poses (x, y, z, yaw)."""
        poses = self.world.object_poses(self._seconds(timestamp_us))
        distance = np.linalg.norm(poses[:, :2] - self._ego(timestamp_us)[:2, 3], axis=1)
        return [(self.world.objects[i], poses[i]) for i in np.flatnonzero(distance < _SIGHT_M)]

    def _ego(self, timestamp_us: int) -> NDArray[np.float64]:
        return self.world.ego_pose(self._seconds(timestamp_us))

    def _seconds(self, timestamp_us: int) -> float:
        return (timestamp_us - self._drive.start_us) / 1e6
