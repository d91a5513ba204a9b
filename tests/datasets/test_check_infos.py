"""Info files of other makers: what is missing or implausible is named with file, frame and field."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from mmdet3d.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope

import projects.streampetr  # noqa: F401
from mdp_mmdet3d.errors import FileFormatError

from .test_stream_dataset import CONFIGS

NAN = float("nan")


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmdet3d")


@pytest.fixture
def read(mini_root, tmp_path):
    """Function that changes row 1 (or all rows) of the training info file and builds the data set."""
    init_default_scope("mmdet3d")
    config = Config.fromfile(CONFIGS / "nuscenes_704x256.py")
    content = pickle.loads((mini_root / "nuscenes_infos_train.pkl").read_bytes())

    def run(edit, every=False, loader="importance_dataloader", version="v1.0-mini"):
        changed = copy.deepcopy(content)
        changed["metainfo"]["version"] = version
        for record in changed["data_list"] if every else changed["data_list"][1:2]:
            edit(record)
        (tmp_path / "infos.pkl").write_bytes(pickle.dumps(changed))
        settings = {**config[loader].dataset, "data_root": str(mini_root), "ann_file": str(tmp_path / "infos.pkl")}
        return DATASETS.build(settings), content["data_list"]

    return run


def set_number(record, camera, key, index, value):
    matrix = np.array(record["images"][camera][key], float)
    matrix[index] = value
    record["images"][camera][key] = matrix.tolist()


def drive_off(record):
    matrix = np.array(record["ego2global"], float)
    matrix[0, 3] += 1e5
    record["ego2global"] = matrix.tolist()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.pop("ego2global"), "ego2global of .* is missing"),
        (lambda r: r.update(ego2global=[[NAN] * 4] * 4), "ego2global of .* NaN"),
        (lambda r: r["lidar_points"].pop("lidar2ego"), r"lidar_points\.lidar2ego of .* is missing"),
        (lambda r: r["images"]["CAM_BACK"].pop("lidar2cam"), r"images\.CAM_BACK\.lidar2cam of .* is missing"),
        (lambda r: r["images"].update(CAM_BACK=None), r"images\.CAM_BACK of .* is None"),
        (lambda r: r["images"]["CAM_BACK"].update(img_path=None), r"images\.CAM_BACK\.img_path of .* is None"),
        (lambda r: r.update(scene_token=None), "scene_token of .* is None"),
        (lambda r: r.pop("timestamp"), "timestamp of .* is missing"),
        (lambda r: r.pop("instances"), "instances of .* is missing, but ground truth is needed"),
        (lambda r: set_number(r, "CAM_BACK", "cam2img", (0, 0), 0.0), r"images\.CAM_BACK\.cam2img of .* focal"),
        (lambda r: set_number(r, "CAM_BACK", "lidar2cam", (0, 3), NAN), r"images\.CAM_BACK\.lidar2cam of .* NaN"),
        (lambda r: r.update(timestamp=int(1e6 * r["timestamp"])), "timestamp of .* looks like microseconds"),
    ],
)
def test_a_field_of_one_frame(read, edit, message):
    with pytest.raises(FileFormatError, match=rf"infos\.pkl: {message}.*create_infos") as error:
        len(read(edit)[0])
    assert "(row 1)" in str(error.value)


def test_other_rules(read, mini_root):
    with pytest.raises(FileFormatError, match=r"token of frame None .row 1. is missing"):
        len(read(lambda r: r.pop("token"))[0])
    with pytest.raises(FileFormatError, match=r"infos\.pkl: its metainfo\.version is None"):
        len(read(lambda r: None, version=None)[0])
    with pytest.raises(FileFormatError, match=r"from frame .* to .* ego_pose jumps by"):
        len(read(drive_off)[0])
    with pytest.raises(FileFormatError, match="looks like microseconds"):
        len(read(lambda r: r.update(timestamp=int(1e6 * r["timestamp"])), every=True)[0])


def test_unusual_but_good_files_are_read(read):
    expected, records = read(lambda r: None)
    start = records[0]["timestamp"]
    for edit in (
        lambda r: r.update(timestamp=r["timestamp"] - start),
        lambda r: r.update(ego2global=np.asarray(r["ego2global"], np.float32)),
        lambda r: [image.update(cam2img=np.pad(image["cam2img"], (0, 1)).tolist()) for image in r["images"].values()],
    ):
        data, _ = read(edit, every=True)
        assert [data.get_data_info(i)["token"] for i in range(len(data))] == [
            expected.get_data_info(i)["token"] for i in range(len(expected))
        ]


def test_a_test_split_has_no_ground_truth_and_needs_none(read):
    data, records = read(lambda r: r.pop("instances"), every=True, loader="val_dataloader")
    assert len(data) == len(records)
    assert data[0]["inputs"]["img"].shape[0] == 6


def test_a_jump_separates_scenes_that_are_not_told(read):
    def without_tokens(record):
        record.pop("scene_token")
        record["lidar_sweeps"] = [{"lidar_points": {"lidar_path": "sweeps/x"}}]

    data, records = read(without_tokens, every=True)
    scenes = {data.get_data_info(i)["scene_token"] for i in range(len(data))}
    assert len(scenes) == len({record["scene_token"] for record in records})
