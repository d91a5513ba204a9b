"""MMDetection3D's NuScenesMetric (lidar frame, info file) against the devkit alone (global frame, tables)."""

from __future__ import annotations

import json

import mmengine
import numpy as np
import pytest
import torch
from mmdet3d.evaluation.metrics import NuScenesMetric
from mmdet3d.structures import LiDARInstance3DBoxes
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.common.loaders import load_gt
from nuscenes.eval.detection.data_classes import DetectionBox
from nuscenes.eval.detection.evaluate import DetectionEval
from pyquaternion import Quaternion

from mdp_mmdet3d.datasets.conventions import INFO_CLASSES
from mdp_mmdet3d.errors import MdpError
from projects.streampetr.metric import ClassSetNuScenesMetric

TOLERANCE = 5e-4
VEHICLES = ("car", "construction_vehicle", "bus", "truck", "trailer")


def attribute(name: str, velocity: np.ndarray) -> str:
    """The rule of NuScenesMetric, which predicts no attributes, in other words."""
    if np.linalg.norm(velocity) > 0.2:
        moving = dict.fromkeys(VEHICLES, "vehicle.moving")
        moving |= dict.fromkeys(("bicycle", "motorcycle"), "cycle.with_rider")
        return moving.get(name, NuScenesMetric.DefaultAttribute[name])
    still = {"pedestrian": "pedestrian.standing", "bus": "vehicle.stopped"}
    return still.get(name, NuScenesMetric.DefaultAttribute[name])


@pytest.fixture(scope="module")
def detections(mini_nusc) -> dict[str, list[dict]]:
    """Ground truth of the split with errors of every kind: moved, turned, resized, missed, confused, made up."""
    rng = np.random.default_rng(0)
    truth = load_gt(mini_nusc, "mini_val", DetectionBox)
    results: dict[str, list[dict]] = {}
    for token in truth.sample_tokens:
        results[token] = []
        for box in truth[token]:
            if rng.random() < 0.15:
                continue
            for _ in range(1 + int(rng.random() < 0.2)):
                name = str(rng.choice(INFO_CLASSES)) if rng.random() < 0.1 else box.detection_name
                velocity = np.nan_to_num(box.velocity) + rng.normal(0, 0.3, 2) * (rng.random() < 0.5)
                turn = Quaternion(axis=[0, 0, 1], radians=rng.normal(0, 0.3))
                results[token].append(dict(
                    sample_token=token, translation=(np.array(box.translation) + rng.normal(0, 0.5, 3)).tolist(),
                    size=(np.array(box.size) * rng.uniform(0.8, 1.25, 3)).tolist(),
                    rotation=(turn * Quaternion(box.rotation)).elements.tolist(), velocity=velocity.tolist(),
                    detection_name=name, detection_score=float(rng.uniform(0.05, 1)),
                    attribute_name=attribute(name, velocity)))  # fmt: skip
    return results


def by_devkit(nusc, results, folder) -> dict:
    path = folder / "results.json"
    meta = {"use_camera": True, "use_lidar": False, "use_radar": False, "use_map": False, "use_external": False}
    path.write_text(json.dumps({"meta": meta, "results": results}))
    evaluation = DetectionEval(
        nusc, config_factory("detection_cvpr_2019"), str(path), "mini_val", str(folder), verbose=False
    )
    return evaluation.evaluate()[0].serialize()


def in_lidar_frame(nusc, token: str, boxes: list[dict]) -> dict:
    """Boxes as the detector gives them, by the devkit's tables."""
    data = nusc.get("sample_data", nusc.get("sample", token)["data"]["LIDAR_TOP"])
    steps = (
        nusc.get("ego_pose", data["ego_pose_token"]),
        nusc.get("calibrated_sensor", data["calibrated_sensor_token"]),
    )
    rows = []
    for box in boxes:
        centre, heading = np.array(box["translation"]), Quaternion(box["rotation"])
        velocity = np.array([*box["velocity"], 0.0])
        for step in steps:
            inverse = Quaternion(step["rotation"]).inverse
            centre = inverse.rotate(centre - np.array(step["translation"]))
            heading, velocity = inverse * heading, inverse.rotate(velocity)
        width, length, height = box["size"]
        rows.append([*centre, length, width, height, heading.yaw_pitch_roll[0], *velocity[:2]])
    return dict(
        bboxes_3d=LiDARInstance3DBoxes(torch.tensor(rows, dtype=torch.float32), box_dim=9, origin=(0.5, 0.5, 0.5)),
        scores_3d=torch.tensor([box["detection_score"] for box in boxes]),
        labels_3d=torch.tensor([INFO_CLASSES.index(box["detection_name"]) for box in boxes]),
    )


@pytest.mark.parametrize("metric_class", [NuScenesMetric, ClassSetNuScenesMetric])
def test_both_give_the_same_figures(metric_class, detections, mini_nusc, mini_root, tmp_path) -> None:
    expected = by_devkit(mini_nusc, detections, tmp_path)
    info_file = mini_root / "nuscenes_infos_val.pkl"
    metric = metric_class(str(mini_root), str(info_file), modality=dict(use_camera=True, use_lidar=False))
    metric.dataset_meta = dict(classes=INFO_CLASSES, version="v1.0-mini")
    for row, info in enumerate(mmengine.load(info_file)["data_list"]):
        instances = in_lidar_frame(mini_nusc, info["token"], detections[info["token"]])
        metric.process({}, [dict(pred_instances_3d=instances, pred_instances={}, sample_idx=row)])
    found = {
        name.removeprefix("pred_instances_3d_NuScenes/"): value
        for name, value in metric.compute_metrics(metric.results).items()
    }

    assert 0.2 < expected["mean_ap"] < 0.9
    figures = {"mAP": expected["mean_ap"], "NDS": expected["nd_score"]}
    figures |= {metric.ErrNameMapping[name]: value for name, value in expected["tp_errors"].items()}
    for name in INFO_CLASSES:
        figures |= {f"{name}_AP_dist_{dist}": value for dist, value in expected["label_aps"][name].items()}
        figures |= {f"{name}_{error}": value for error, value in expected["label_tp_errors"][name].items()}
    assert sum(value not in (0.0, 1.0) for value in figures.values() if np.isfinite(value)) > 30
    if metric_class is ClassSetNuScenesMetric:
        figures |= {"mAP_set": expected["mean_ap"], "NDS_set": expected["nd_score"]}
    assert found.keys() == figures.keys()
    for name, value in figures.items():
        # A detector's box turns about the vertical of a lidar that is tilted a little, in float32.
        assert found[name] == pytest.approx(value, abs=TOLERANCE, nan_ok=True), name


@pytest.fixture
def evaluate(mini_root, tmp_path):
    """Function that evaluates boxes by sample token with our metric."""
    info_file = mini_root / "nuscenes_infos_val.pkl"
    tokens = [info["token"] for info in mmengine.load(info_file)["data_list"]]

    def run(boxes=(), tokens=tokens, version="v1.0-mini"):
        metric = ClassSetNuScenesMetric(str(mini_root), str(info_file))
        metric.version = version
        results = {token: [{**box, "sample_token": token} for box in boxes] for token in tokens}
        content = {"meta": dict.fromkeys(("use_camera", "use_lidar", "use_radar", "use_map", "use_external"), True)}
        mmengine.dump({**content, "results": results}, tmp_path / "results.json")
        return metric._evaluate_single(str(tmp_path / "results.json"), ["car", "traffic_cone"])

    return run, tokens


def test_no_box_at_all_evaluates_to_zero_as_the_devkit_defines_it(evaluate) -> None:
    found = {name.rpartition("/")[2]: value for name, value in evaluate[0]().items()}
    assert all(found[name] == 0.0 for name in ("mAP", "NDS", "mAP_set", "NDS_set", "car_AP_dist_0.5"))
    assert found["mATE"] == found["car_trans_err"] == 1.0
    assert np.isnan(found["traffic_cone_vel_err"])


def test_one_box_far_off_gives_the_same_names_and_figures(evaluate) -> None:
    far = dict(translation=[0.0, 0, 0], size=[1.0, 1, 1], rotation=[1.0, 0, 0, 0], velocity=[0.0, 0])
    far |= dict(detection_name="car", detection_score=0.1, attribute_name="vehicle.parked")
    none, one = evaluate[0](), evaluate[0]([far])
    assert none.keys() == one.keys()
    for name, value in one.items():
        assert none[name] == pytest.approx(value, nan_ok=True), name


def test_what_the_devkit_refuses_is_said(evaluate) -> None:
    run, tokens = evaluate
    box = dict(translation=[0.0, 0, 0], size=[1.0, 1, 1], rotation=[1.0, 0, 0, 0], velocity=[0.0, 0])
    box |= dict(detection_name="car", detection_score=0.1, attribute_name="")
    with pytest.raises(MdpError, match=r"which has 2 frames .*all frames of the split"):
        run([box], tokens[1:])
    with pytest.raises(MdpError, match=r"ground truth is not public.*submit_nuscenes"):
        run([box], version="v1.0-test")
