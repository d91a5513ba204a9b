"""The devkit takes the miniature set for nuScenes: it loads, measures velocities and evaluates."""

from __future__ import annotations

import json

import numpy as np
import pytest
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.common.loaders import load_gt
from nuscenes.eval.detection.data_classes import DetectionBox
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.utils.splits import mini_train, mini_val

from mdp_mmdet3d.simdata.mini_nuscenes.catalogue import CATALOGUE

META = {"use_camera": True, "use_lidar": False, "use_radar": False, "use_map": False, "use_external": False}


def evaluate(nusc, results, folder):
    path = folder / "results.json"
    path.write_text(json.dumps({"meta": META, "results": results}))
    evaluation = DetectionEval(
        nusc, config_factory("detection_cvpr_2019"), str(path), "mini_val", str(folder), verbose=False
    )
    metrics, _ = evaluation.evaluate()
    return evaluation, metrics.serialize()


def test_scenes_have_official_names(mini_nusc):
    names = [scene["name"] for scene in mini_nusc.scene]
    assert names == [*mini_train[:2], *mini_val[:1]]


def test_ground_truth_as_prediction_is_perfect(mini_nusc, tmp_path):
    truth = load_gt(mini_nusc, "mini_val", DetectionBox)
    results = {}
    for token in truth.sample_tokens:
        results[token] = [
            {**box.serialize(), "detection_score": 1.0, "velocity": np.nan_to_num(box.velocity).tolist()}
            for box in truth[token]
        ]
    evaluation, metrics = evaluate(mini_nusc, results, tmp_path)
    counted = {box.detection_name for box in evaluation.gt_boxes.all}
    assert counted == set(CATALOGUE)
    assert metrics["mean_ap"] > 0.999
    assert metrics["tp_errors"]["trans_err"] < 1e-6
    assert metrics["tp_errors"]["attr_err"] < 1e-6


def test_a_single_wrong_prediction_scores_nothing(mini_nusc, tmp_path):
    # The devkit itself refuses a file without any box, so one car is predicted where none is.
    truth = load_gt(mini_nusc, "mini_val", DetectionBox)
    results = {token: [] for token in truth.sample_tokens}
    first = truth.sample_tokens[0]
    wrong = next(box for box in truth[first] if box.detection_name == "car").serialize()
    wrong.update(detection_name="bus", detection_score=0.5, velocity=[0.0, 0.0])
    results[first] = [wrong]
    _, metrics = evaluate(mini_nusc, results, tmp_path)
    assert metrics["mean_ap"] == 0


def test_velocities_are_plausible_and_agree_with_attributes(mini_nusc):
    moving = 0
    for annotation in mini_nusc.sample_annotation:
        speed = np.linalg.norm(mini_nusc.box_velocity(annotation["token"])[:2])
        if np.isnan(speed):
            continue
        names = [mini_nusc.get("attribute", token)["name"] for token in annotation["attribute_tokens"]]
        if names and names[0].endswith(".moving"):
            assert 0.2 < speed < 15
            moving += 1
        elif not names or names[0].endswith((".parked", ".stopped", ".standing", ".without_rider")):
            assert speed < 1e-6
    assert moving > 20


def test_vehicle_and_traffic_are_on_the_map_and_buildings_are_not(mini_nusc):
    for scene in mini_nusc.scene:
        log = mini_nusc.get("log", scene["log_token"])
        mask = mini_nusc.get("map", log["map_token"])["mask"]
        sample = mini_nusc.get("sample", scene["first_sample_token"])
        lidar = mini_nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
        x, y, _ = mini_nusc.get("ego_pose", lidar["ego_pose_token"])["translation"]
        assert mask.is_on_mask(x, y).all()
        centres = np.array([mini_nusc.get("sample_annotation", token)["translation"] for token in sample["anns"]])
        assert mask.is_on_mask(centres[:, 0], centres[:, 1]).all()
        assert not mask.is_on_mask(1.0, 1.0).any()


@pytest.mark.parametrize("camera", ["CAM_FRONT", "CAM_BACK"])
def test_camera_boxes_are_found_by_the_devkit(mini_nusc, camera):
    found = 0
    for sample in mini_nusc.sample:
        _, boxes, intrinsics = mini_nusc.get_sample_data(sample["data"][camera])
        found += len(boxes)
        assert intrinsics.shape == (3, 3)
    assert found > len(mini_nusc.sample)
