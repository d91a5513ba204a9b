"""Objects keep apart and inside their boxes; shapes are convex; specifications are checked."""

from __future__ import annotations

import numpy as np
import pytest
from shapely.geometry import Polygon

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.simdata.mini_nuscenes import MiniNuScenesSpec, easy_spec
from mdp_mmdet3d.simdata.mini_nuscenes.catalogue import CATALOGUE
from mdp_mmdet3d.simdata.mini_nuscenes.mesh import MeshBuilder
from mdp_mmdet3d.simdata.mini_nuscenes.road import Road
from mdp_mmdet3d.simdata.mini_nuscenes.scenery import make_scenery
from mdp_mmdet3d.simdata.mini_nuscenes.shapes import cuboid_mesh, object_mesh
from mdp_mmdet3d.simdata.mini_nuscenes.world import World


def footprint(x, y, yaw, width, length):
    corners = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) * [length / 2, width / 2]
    turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
    return Polygon(corners @ turn.T + [x, y])


@pytest.fixture(scope="module")
def world():
    return World(MiniNuScenesSpec(seed=1), 0, (210.0, 210.0))


@pytest.mark.parametrize("time_s", [0.0, 7.3, 60.0])
def test_nobody_touches_anybody(world, time_s):
    poses = world.object_poses(time_s)
    shapes = [footprint(x, y, yaw, *item.size_m[:2]) for item, (x, y, _, yaw) in zip(world.objects, poses)]
    ego = world.ego_pose(time_s)
    shapes.append(footprint(*ego[:2, 3], np.arctan2(ego[1, 0], ego[0, 0]), 1.9, 4.8))
    centres = np.vstack([poses[:, :2], ego[:2, 3]])
    names = [item.kind.name for item in world.objects] + ["ego"]
    for i in range(len(shapes)):
        for j in np.flatnonzero(np.linalg.norm(centres - centres[i], axis=1) < 13):
            # People are small and weave around each other on the pavement.
            if j > i and "pedestrian" not in (names[i], names[j]):
                assert shapes[i].intersection(shapes[j]).area < 0.05, (names[i], names[j])


def test_all_classes_occur_in_number_and_the_wanted_density(world):
    names = [item.kind.name for item in world.objects]
    assert set(names) == set(CATALOGUE)
    near = []
    for time_s in np.arange(0, 60, 5.0):
        poses, ego = world.object_poses(time_s), world.ego_pose(time_s)
        near.append((np.linalg.norm(poses[:, :2] - ego[:2, 3], axis=1) < 60).sum())
    assert 25 <= np.mean(near) <= 70


def test_moving_things_move_along_their_heading(world):
    before, now = world.object_poses(4.99), world.object_poses(5.01)
    velocity = (now[:, :2] - before[:, :2]) / 0.02
    speed = np.linalg.norm(velocity, axis=1)
    for item, pose, v, s in zip(world.objects, now, velocity, speed):
        if item.attribute in ("vehicle.moving", "cycle.with_rider", "pedestrian.moving"):
            assert 0.3 < s < 16
            assert v @ [np.cos(pose[3]), np.sin(pose[3])] == pytest.approx(s, rel=1e-3)
        else:
            assert s < 1e-9


def test_the_vehicle_turns_and_its_pose_is_rigid(world):
    poses = [world.ego_pose(t) for t in np.arange(0, 40, 0.5)]
    yaws = np.unwrap([np.arctan2(pose[1, 0], pose[0, 0]) for pose in poses])
    assert np.ptp(yaws) > 0.3
    for pose in poses:
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)


def test_the_road_is_closed_and_smooth():
    road = Road(np.random.default_rng(0), (0, 0))
    s = np.linspace(0, road.length_m, 4001)
    x, y, heading = road.pose(s, 2.0)
    steps = np.hypot(np.diff(x), np.diff(y))
    assert steps.max() < 1.2 * np.median(steps) * 1.1
    assert np.hypot(x[-1] - x[0], y[-1] - y[0]) < 0.01
    turns = np.abs((np.diff(heading) + np.pi) % (2 * np.pi) - np.pi)
    assert turns.max() < 0.02


@pytest.fixture
def checked_builder(monkeypatch):
    """Lets every polyhedron be checked for convexity: all vertices lie in all its half spaces."""
    original = MeshBuilder.polyhedron
    count = []

    def checked(self, faces, colours, textures=None, solid=True):
        original(self, faces, colours, textures, True)
        planes = self._solids[-1]
        points = np.concatenate([np.asarray(face) for face in faces])
        assert (points @ planes[:, :3].T <= planes[:, 3] + 1e-6).all(), "not convex"
        if not solid:
            self._solids.pop()
            self._intensities.pop()
        count.append(len(faces))

    monkeypatch.setattr(MeshBuilder, "polyhedron", checked)
    return count


@pytest.mark.parametrize("name", list(CATALOGUE))
def test_shapes_are_convex_parts_inside_the_annotated_box(name, checked_builder):
    rng = np.random.default_rng(0)
    for trial in range(4):
        size = tuple(np.asarray(CATALOGUE[name].size_m) * rng.uniform(0.9, 1.1, 3))
        for mesh in (object_mesh(name, size, rng, trial % 2 == 0, trial % 2 == 1), cuboid_mesh(name, size)):
            extent = np.abs(mesh.polygons - [0, 0, size[2] / 2]).reshape(-1, 3).max(0)
            assert (extent <= np.array([size[1], size[0], size[2]]) / 2 + 1e-9).all(), extent / size
            # Most of the box is used, or boxes would not describe what is seen.
            assert (extent >= 0.35 * np.array([size[1], size[0], size[2]])).all()
    assert checked_builder


def test_scenery_is_convex_and_leaves_the_road_free(checked_builder):
    rng = np.random.default_rng(0)
    road = Road(rng, (0, 0))
    scenery = make_scenery(rng, road)
    line = road.line(0.0)
    for mesh, position, reach in zip(scenery.meshes, scenery.positions, scenery.reach_m):
        points = mesh.polygons.reshape(-1, 3)
        low = points[points[:, 2] < 4][:, :2]
        gaps = np.linalg.norm(low[:, None] - line[None], axis=-1)
        assert gaps.min() > 12.5
        assert np.linalg.norm(points[:, :2] - position, axis=1).max() < reach + 0.5
    assert checked_builder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenes": 11}, "11 scenes"),
        ({"scenes": 1}, "1 scenes"),
        ({"frames": 0}, "frames is 0"),
        ({"classes": ("car", "tram")}, "tram"),
        ({"classes": ()}, "unknown classes"),
        ({"image_size": (100, 100)}, "100x100"),
        ({"version": "v2"}, "v2"),
        ({"object_count": 0}, "object_count is 0"),
    ],
)
def test_impossible_specifications_are_refused(changes, message):
    with pytest.raises(MdpError, match=message):
        MiniNuScenesSpec(**changes)


def test_too_many_objects_are_refused():
    with pytest.raises(MdpError, match="do not fit"):
        World(MiniNuScenesSpec(classes=("bus",), object_count=200), 0, (0.0, 0.0))


def test_the_easy_variant_holds_out_a_seventh():
    spec = easy_spec()
    assert spec.split_sizes == (60, 10)
    assert len(set(spec.scene_names)) == 70
