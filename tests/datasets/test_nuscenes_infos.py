"""Our info files say what MMDetection3D's own converter says, plus scene links."""

from __future__ import annotations

import errno
import importlib.util
import os
import pickle
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mdp_mmdet3d.datasets import nuscenes_infos
from mdp_mmdet3d.datasets.conventions import CAMERAS
from mdp_mmdet3d.datasets.nuscenes_infos import annotate_infos, create_infos, projected_bbox
from mdp_mmdet3d.errors import FileFormatError, MissingDatasetError, WriteError

from ..data_files import data_path

LINKS = {"scene_token", "prev", "next"}


def load(path: Path) -> dict:
    with path.open("rb") as stream:
        return pickle.load(stream)


@pytest.fixture(scope="module")
def ours(mini_root):
    return {split: load(mini_root / f"nuscenes_infos_{split}.pkl") for split in ("train", "val")}


@pytest.fixture(scope="module")
def stock_folder(mini_root, tmp_path_factory):
    """Info files of MMDetection3D's converter, run on the miniature set."""
    import mmdet3d
    from mmdet3d.datasets import convert_utils

    tools = Path(mmdet3d.__file__).parent / ".mim" / "tools" / "dataset_converters"
    if not tools.is_dir():
        pytest.skip(f"mmdet3d was installed without its tools ({tools})")

    def module(name):
        spec = importlib.util.spec_from_file_location(f"stock_{name}", tools / f"{name}.py")
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded
        spec.loader.exec_module(loaded)
        return loaded

    folder = tmp_path_factory.mktemp("stock")
    (folder / "data").mkdir()
    (folder / "data" / "nuscenes").symlink_to(mini_root)
    out = folder / "infos"
    out.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # The converter takes every image for 1600x900.
        clip = partial(convert_utils.post_process_coords, imsize=(320, 180))
        patch.setattr(convert_utils, "post_process_coords", clip)
        converter = module("nuscenes_converter")
        patch.setattr(
            converter.mmengine, "dump", lambda data, path: (out / Path(path).name).write_bytes(pickle.dumps(data))
        )
        converter.create_nuscenes_infos("data/nuscenes", "stock", version="v1.0-mini")
        patch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(convert_utils, "post_process_coords", clip)
        update = module("update_infos_to_v2")
        for split in ("train", "val"):
            update.update_nuscenes_infos(str(out / f"stock_infos_{split}.pkl"), str(folder))
    return folder


def assert_same(found, expected, where):
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list) and expected and not isinstance(expected[0], (float, int)):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(expected, (float, list)):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=2e-4, err_msg=where)
    else:
        assert found == expected, where


@pytest.mark.parametrize("split", ["train", "val"])
def test_records_agree_with_the_stock_converter(ours, stock_folder, split):
    stock = load(stock_folder / f"stock_infos_{split}.pkl")
    assert ours[split]["metainfo"] == stock["metainfo"]
    assert len(ours[split]["data_list"]) == len(stock["data_list"]) > 0
    for found, expected in zip(ours[split]["data_list"], stock["data_list"]):
        assert set(found) - LINKS == set(expected)
        for sweep in [*found.get("lidar_sweeps", []), *expected.get("lidar_sweeps", [])]:
            # Stock leaves the number of features of sweeps open and stores paths with the data root.
            sweep["lidar_points"].pop("num_pts_feats")
            sweep["lidar_points"]["lidar_path"] = Path(sweep["lidar_points"]["lidar_path"]).name
        assert_same({key: found[key] for key in expected}, expected, found["token"])


def test_annotating_stock_files_adds_our_links_and_nothing_else(ours, stock_folder, mini_root, tmp_path):
    stock = load(stock_folder / "stock_infos_train.pkl")
    copy = tmp_path / "infos.pkl"
    copy.write_bytes((stock_folder / "stock_infos_train.pkl").read_bytes())
    assert annotate_infos(copy, mini_root) == copy
    for record, before, own in zip(load(copy)["data_list"], stock["data_list"], ours["train"]["data_list"]):
        assert {key: record[key] for key in LINKS} == {key: own[key] for key in LINKS}
        assert set(record) == set(before) | LINKS


def test_records_have_the_layout_of_the_real_frame(ours):
    real = load(next(data_path("nuscenes_frame").glob("*.pkl")))
    record = ours["train"]["data_list"][0]
    assert {key: type(value) for key, value in ours["train"]["metainfo"].items()} == {
        key: type(value) for key, value in real["metainfo"].items()
    }
    assert ours["train"]["metainfo"]["categories"] == real["metainfo"]["categories"]

    def layout(value):
        if isinstance(value, dict):
            return {key: layout(item) for key, item in value.items()}
        if isinstance(value, list):
            return [layout(value[0])] if value else []
        return type(value.item() if isinstance(value, np.generic) else value)

    assert layout({key: value for key, value in record.items() if key not in LINKS}) == layout(real["data_list"][0])


def test_links_follow_the_tables(ours, mini_nusc):
    for content in ours.values():
        for index, record in enumerate(content["data_list"]):
            sample = mini_nusc.get("sample", record["token"])
            assert record["sample_idx"] == index
            assert {key: record[key] for key in LINKS} == {key: sample[key] for key in LINKS}
            assert list(record["images"]) == list(CAMERAS)


def test_lidar_to_camera_passes_through_both_times(ours, mini_nusc):
    """A fixed point of the world is mapped as the devkit maps it, with the camera's own ego pose."""
    from nuscenes.utils.data_classes import Box
    from pyquaternion import Quaternion

    record = ours["val"]["data_list"][1]
    sample = mini_nusc.get("sample", record["token"])
    lidar2global = np.array(record["ego2global"]) @ np.array(record["lidar_points"]["lidar2ego"])
    point = np.array([7.0, 12.0, -0.5, 1.0])
    for camera in CAMERAS:
        data = mini_nusc.get("sample_data", sample["data"][camera])
        box = Box((lidar2global @ point)[:3], [1, 1, 1], Quaternion())
        for table in ("ego_pose", "calibrated_sensor"):
            row = mini_nusc.get(table, data[f"{table}_token"])
            box.translate(-np.array(row["translation"]))
            box.rotate(Quaternion(row["rotation"]).inverse)
        np.testing.assert_allclose(np.array(record["images"][camera]["lidar2cam"]) @ point, [*box.center, 1], atol=1e-3)


def test_projected_bbox_is_clipped_to_the_image_and_none_outside():
    intrinsics = np.array([[100.0, 0, 50], [0, 100, 40], [0, 0, 1]])
    cube = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (9, 11)], float).T
    np.testing.assert_allclose(
        projected_bbox(cube, intrinsics, (100, 80)), [50 - 100 / 9, 40 - 100 / 9, 50 + 100 / 9, 40 + 100 / 9]
    )
    shifted = cube + np.array([[-5.0], [0], [0]])
    box = projected_bbox(shifted, intrinsics, (100, 80))
    assert box[0] == 0
    assert box[2] == pytest.approx(50 - 400 / 11)
    assert projected_bbox(cube - [[100], [0], [0]], intrinsics, (100, 80)) is None
    assert projected_bbox(cube - [[0], [0], [30]], intrinsics, (100, 80)) is None


def test_missing_tables_and_unknown_versions_name_the_remedy(tmp_path, mini_root):
    with pytest.raises(MissingDatasetError, match="create_mini_nuscenes"):
        create_infos(tmp_path, "v1.0-mini")
    with pytest.raises(MissingDatasetError, match=r"v1\.0-mini"):
        create_infos(mini_root, "v1.0-trainval")
    with pytest.raises(MissingDatasetError, match=r"v0\.9"):
        create_infos(mini_root, "v0.9")


def test_files_that_are_no_info_files_are_refused(tmp_path, mini_root, ours):
    broken = tmp_path / "broken.pkl"
    broken.write_bytes(b"not a pickle")
    with pytest.raises(FileFormatError, match="no v2 info file"):
        annotate_infos(broken, mini_root)
    with pytest.raises(MissingDatasetError, match="does not exist"):
        annotate_infos(tmp_path / "absent.pkl", mini_root)
    foreign = tmp_path / "foreign.pkl"
    record = {**ours["val"]["data_list"][0], "token": "f" * 32}
    foreign.write_bytes(pickle.dumps({"metainfo": ours["val"]["metainfo"], "data_list": [record]}))
    before = foreign.read_bytes()
    with pytest.raises(FileFormatError, match="ffff"):
        annotate_infos(foreign, mini_root)
    assert foreign.read_bytes() == before


def test_the_split_follows_the_official_scene_names(ours, mini_nusc):
    names = {scene["token"]: scene["name"] for scene in mini_nusc.scene}
    for split, content in ours.items():
        official = nuscenes_infos.create_splits_scenes()[f"mini_{split}"]
        assert {names[record["scene_token"]] for record in content["data_list"]} <= set(official)


def test_info_files_of_a_data_set_are_written_all_or_none(mini_root, monkeypatch):
    before = {split: (mini_root / f"nuscenes_infos_{split}.pkl").read_bytes() for split in ("train", "val")}
    dump = nuscenes_infos._dump

    def full_at_the_second(content, path):
        if "val" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        dump({**content, "changed": True}, path)

    with monkeypatch.context() as patch:
        patch.setattr(nuscenes_infos, "_dump", full_at_the_second)
        with pytest.raises(WriteError, match="No space left on device"):
            create_infos(mini_root)
    for split, content in before.items():
        assert (mini_root / f"nuscenes_infos_{split}.pkl").read_bytes() == content
    assert not list(mini_root.glob(".*"))
