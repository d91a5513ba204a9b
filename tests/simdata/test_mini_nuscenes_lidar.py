"""Lidar returns lie on the surfaces, and the counts in the tables are true."""

from __future__ import annotations

import numpy as np
import pytest
from nuscenes.utils.data_classes import LidarPointCloud
from nuscenes.utils.geometry_utils import points_in_box

from mdp_mmdet3d.simdata.mini_nuscenes.geometry import rotation_matrix
from mdp_mmdet3d.simdata.mini_nuscenes.lidar import BEAMS, SolidThing, _first_hit, beam_directions, scan
from mdp_mmdet3d.simdata.mini_nuscenes.mesh import MeshBuilder


def slab_distance(directions, low, high, origin):
    """Distance along rays to an axis-aligned box by the slab method, inf for a miss."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.stack([(low - origin) / directions, (high - origin) / directions])
    entry, leave = t.min(0).max(-1), t.max(0).min(-1)
    return np.where((entry > 0) & (entry <= leave), entry, np.inf)


def box_thing(low, high, intensity=50.0):
    builder = MeshBuilder()
    builder.box(*zip(low, high), (100, 100, 100))
    mesh = builder.build()
    centre = (np.asarray(low) + np.asarray(high)) / 2
    return SolidThing(centre, float(np.linalg.norm(np.subtract(high, low))) / 2, mesh.solids, np.array([intensity]))


def test_counts_in_the_tables_equal_a_brute_force_count(mini_nusc):
    checked = 0
    for sample in mini_nusc.sample:
        path, boxes, _ = mini_nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
        points = LidarPointCloud.from_file(path).points[:3].astype(np.float64)
        for box in boxes:
            expected = mini_nusc.get("sample_annotation", box.token)["num_lidar_pts"]
            assert points_in_box(box, points).sum() == expected
            checked += expected > 0
    assert checked > 100


def test_first_hit_agrees_with_the_slab_method():
    rng = np.random.default_rng(0)
    low, high = np.array([4.0, -1.0, -1.5]), np.array([8.0, 1.0, 0.5])
    directions = rng.normal(size=(40, 50, 3)) + np.array([2, 0, 0])
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    thing = box_thing(low, high)
    found, part = _first_hit(directions, thing.solids[..., :3], thing.solids[..., 3])
    expected = slab_distance(directions, low, high, np.zeros(3))
    assert 100 < np.isfinite(expected).sum() < 2000
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert (part == 0).all()


def test_a_scan_sees_the_nearest_of_boxes_and_ground():
    pose = np.eye(4)
    pose[:3, :3] = rotation_matrix(0.7, 0.01, -0.02)
    pose[:3, 3] = 50, 20, 1.8
    boxes = [((60, 18, 0), (64, 22, 2)), ((66, 10, 0), (67, 30, 6)), ((45, 14, 0), (47, 15, 1))]
    points = scan([box_thing(*box, intensity=40 + i) for i, box in enumerate(boxes)], pose, np.random.default_rng(0))
    directions = (beam_directions() @ pose[:3, :3].T).reshape(-1, 3)
    distances = [slab_distance(directions, *map(np.asarray, box), pose[:3, 3]) for box in boxes]
    with np.errstate(divide="ignore"):
        distances.append(np.where(directions[:, 2] < 0, -1.8 / directions[:, 2], np.inf))
    nearest = np.min(distances, axis=0)
    hit = nearest < 100
    assert len(points) == hit.sum()
    np.testing.assert_allclose(np.linalg.norm(points[:, :3], axis=1), nearest[hit], atol=0.06)
    np.testing.assert_array_equal(points[:, 3], np.array([40, 41, 42, 12])[np.argmin(distances, 0)][hit])
    assert {3, 0, 1, 2} == set(np.argmin(distances, 0)[hit])


def test_a_sweep_has_the_layout_of_nuscenes(mini_nusc):
    path = mini_nusc.get_sample_data_path(mini_nusc.sample[0]["data"]["LIDAR_TOP"])
    points = np.fromfile(path, np.float32).reshape(-1, 5)
    assert np.isfinite(points).all()
    assert set(np.unique(points[:, 4])) <= set(range(BEAMS))
    assert points[:, 3].min() >= 0
    assert points[:, 3].max() <= 255
    assert np.linalg.norm(points[:, :3], axis=1).max() < 101


@pytest.mark.parametrize("thing_first", [True, False])
def test_a_thing_around_the_lidar_or_out_of_range_changes_nothing(thing_first):
    pose = np.eye(4)
    pose[2, 3] = 1.8
    things = [box_thing((300, -5, 0), (310, 5, 50)), box_thing((-2, -2, 0), (2, 2, 4))]
    empty = scan([], pose, np.random.default_rng(1))
    np.testing.assert_array_equal(scan(things[:: 1 if thing_first else -1], pose, np.random.default_rng(1)), empty)
