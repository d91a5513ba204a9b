"""The tables obey nuScenes' schema: columns, unique tokens, links that close."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import cv2
import numpy as np
import pytest

from mdp_mmdet3d.datasets.conventions import CAMERAS, LIDAR

COLUMNS = {
    "category": {"token", "name", "description"},
    "attribute": {"token", "name", "description"},
    "visibility": {"token", "level", "description"},
    "instance": {"token", "category_token", "nbr_annotations", "first_annotation_token", "last_annotation_token"},
    "sensor": {"token", "channel", "modality"},
    "calibrated_sensor": {"token", "sensor_token", "translation", "rotation", "camera_intrinsic"},
    "ego_pose": {"token", "timestamp", "rotation", "translation"},
    "log": {"token", "logfile", "vehicle", "date_captured", "location"},
    "scene": {
        "token",
        "log_token",
        "nbr_samples",
        "first_sample_token",
        "last_sample_token",
        "name",
        "description",
    },
    "sample": {"token", "timestamp", "prev", "next", "scene_token"},
    "sample_data": {
        "token",
        "sample_token",
        "ego_pose_token",
        "calibrated_sensor_token",
        "timestamp",
        "fileformat",
        "is_key_frame",
        "height",
        "width",
        "filename",
        "prev",
        "next",
    },
    "sample_annotation": {
        "token",
        "sample_token",
        "instance_token",
        "visibility_token",
        "attribute_tokens",
        "translation",
        "size",
        "rotation",
        "prev",
        "next",
        "num_lidar_pts",
        "num_radar_pts",
    },
    "map": {"token", "log_tokens", "category", "filename"},
}


@pytest.fixture(scope="module")
def tables(mini_root):
    folder = mini_root / "v1.0-mini"
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def by_token(tables):
    return {name: {row["token"]: row for row in rows} for name, rows in tables.items()}


def test_every_table_has_the_columns_of_the_schema(tables):
    assert set(tables) == set(COLUMNS)
    for name, rows in tables.items():
        assert rows, name
        for row in rows:
            assert set(row) == COLUMNS[name], name


def test_tokens_are_unique_and_well_formed(tables, by_token):
    for name, rows in tables.items():
        assert len(by_token[name]) == len(rows), name
        if name != "visibility":
            assert all(re.fullmatch("[0-9a-f]{32}", row["token"]) for row in rows), name


def test_foreign_keys_exist(tables, by_token):
    for name, rows in tables.items():
        for row in rows:
            for column, value in row.items():
                if column.endswith("_token"):
                    table = {
                        "first_sample": "sample",
                        "last_sample": "sample",
                        "first_annotation": "sample_annotation",
                        "last_annotation": "sample_annotation",
                    }.get(column.removesuffix("_token"), column.removesuffix("_token"))
                    assert value in by_token[table], (name, column)
                elif column in ("attribute_tokens", "log_tokens"):
                    assert all(token in by_token[column.removesuffix("_tokens")] for token in value)


@pytest.mark.parametrize(
    ("table", "group"),
    [("sample", "scene_token"), ("sample_data", "calibrated_sensor_token"), ("sample_annotation", "instance_token")],
)
def test_chains_visit_every_row_of_their_group_once_in_time_order(tables, by_token, table, group):
    def time_us(row):
        return row["timestamp"] if "timestamp" in row else by_token["sample"][row["sample_token"]]["timestamp"]

    for key in {row[group] for row in tables[table]}:
        rows = [row for row in tables[table] if row[group] == key]
        heads = [row for row in rows if row["prev"] == ""]
        assert len(heads) == 1
        chain = [heads[0]]
        while chain[-1]["next"]:
            chain.append(by_token[table][chain[-1]["next"]])
            assert chain[-1]["prev"] == chain[-2]["token"]
        assert sorted(row["token"] for row in chain) == sorted(row["token"] for row in rows)
        assert all(time_us(a) < time_us(b) for a, b in pairwise(chain))


def test_ends_of_scenes_and_instances_agree_with_the_chains(tables, by_token):
    for scene in tables["scene"]:
        samples = [row for row in tables["sample"] if row["scene_token"] == scene["token"]]
        assert scene["nbr_samples"] == len(samples)
        assert by_token["sample"][scene["first_sample_token"]]["prev"] == ""
        assert by_token["sample"][scene["last_sample_token"]]["next"] == ""
    for instance in tables["instance"]:
        rows = [row for row in tables["sample_annotation"] if row["instance_token"] == instance["token"]]
        assert instance["nbr_annotations"] == len(rows) > 0
        assert by_token["sample_annotation"][instance["first_annotation_token"]]["prev"] == ""
        assert by_token["sample_annotation"][instance["last_annotation_token"]]["next"] == ""


def test_every_key_frame_has_seven_sensors_with_their_files(tables, by_token, mini_root):
    channel = {row["token"]: by_token["sensor"][row["sensor_token"]]["channel"] for row in tables["calibrated_sensor"]}
    for sample in tables["sample"]:
        data = [row for row in tables["sample_data"] if row["sample_token"] == sample["token"]]
        assert sorted(channel[row["calibrated_sensor_token"]] for row in data) == sorted([*CAMERAS, LIDAR])
        for row in data:
            path = mini_root / row["filename"]
            if channel[row["calibrated_sensor_token"]] == LIDAR:
                assert row["timestamp"] == sample["timestamp"]
                assert path.stat().st_size % 20 == 0
                assert path.stat().st_size > 10_000 * 20
            else:
                assert 0 <= sample["timestamp"] - row["timestamp"] + 800 < 50_000
                assert cv2.imread(str(path)).shape == (row["height"], row["width"], 3)


def test_poses_are_those_of_their_own_time(tables, by_token):
    positions = {}
    for row in tables["sample_data"]:
        pose = by_token["ego_pose"][row["ego_pose_token"]]
        assert pose["timestamp"] == row["timestamp"]
        assert np.linalg.norm(pose["rotation"]) == pytest.approx(1)
        positions.setdefault(row["sample_token"], []).append((row["timestamp"], pose["translation"]))
    for found in positions.values():
        (t0, p0), (t1, p1) = min(found), max(found)
        speed_mps = np.linalg.norm(np.subtract(p1, p0)) / (t1 - t0) * 1e6
        assert 2 < speed_mps < 15


def test_attributes_fit_their_class_and_visibility_levels_all_occur(tables, by_token):
    allowed = {"vehicle": ("vehicle", "cycle"), "human": ("pedestrian",), "movable_object": ()}
    levels = set()
    for row in tables["sample_annotation"]:
        category = by_token["category"][by_token["instance"][row["instance_token"]]["category_token"]]["name"]
        families = allowed[category.split(".")[0]]
        names = [by_token["attribute"][token]["name"] for token in row["attribute_tokens"]]
        assert len(names) == (1 if families else 0)
        assert all(name.split(".")[0] in families for name in names)
        if category in ("vehicle.bicycle", "vehicle.motorcycle"):
            assert names[0].startswith("cycle.")
        levels.add(row["visibility_token"])
    assert levels == {"1", "2", "3", "4"}
