from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.onnx.reduce import reduce_precision
from mdp_mmdet3d.runtime.synthetic import synthetic_frames
from projects.streampetr.deployed_accuracy import evaluate_deployment
from projects.streampetr.export import export_streampetr

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Config, model and float32 deployment of a small StreamPETR that scores on a small easy data set by chance."""
    from mmdet3d.registry import MODELS

    from mdp_mmdet3d.simdata.mini_nuscenes import easy_spec, write_mini_nuscenes

    base = tmp_path_factory.mktemp("accuracy")
    root = write_mini_nuscenes(base / "nuscenes", easy_spec(scenes=3, frames=4, seed=5))
    init_default_scope("mmdet3d")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINI_NUSCENES_ROOT", str(root))
        config = Config.fromfile(ROOT / "configs/streampetr_mini.py")
    config.work_dir = str(base / "work")
    config.log_level = "ERROR"
    torch.manual_seed(0)
    model = MODELS.build(config.model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma.weight" in name or "beta.weight" in name:
                parameter.normal_(0, 0.05)
            elif name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder = base / "float32"
    manifest = export_streampetr(model, folder, class_names=list(config.class_names), input_size=(64, 176))
    reduce_precision(folder, base / "float16", "float16", synthetic_frames(manifest, 2))
    return config, model, base


def test_engines_score_as_the_model_does(setup, tmp_path):
    config, model, base = setup
    config = copy.deepcopy(config)
    config.work_dir = str(tmp_path)
    runner = Runner.from_cfg(config)
    runner.model.load_state_dict(model.state_dict())
    expected = {name.rpartition("/")[2]: value for name, value in runner.test().items()}
    found = evaluate_deployment(config, model.data_preprocessor, base / "float32")
    assert found["frames"] == 4 and found["metric"] == "ClassSetNuScenesMetric"
    for name in ("mAP", "NDS", "mAP_set", "NDS_set"):
        assert found[name] == pytest.approx(expected[name], abs=1e-3)
    half = evaluate_deployment(config, model.data_preprocessor, base / "float16")
    assert half["NDS"] == pytest.approx(found["NDS"], abs=0.02)


def test_boxes_of_the_ground_truth_score_full_marks(setup, monkeypatch):
    """Boxes go through with the right centre, size, heading, velocity and class: else the scores were not perfect."""
    import numpy as np

    from mdp_mmdet3d.runtime.decode import Detections
    from mdp_mmdet3d.runtime.stream import StreamRunner

    config, model, base = setup
    config = copy.deepcopy(config)
    truth = Runner.build_dataloader({**config.test_dataloader, "batch_size": 1}).dataset
    records = {}
    for index in range(len(truth)):
        info = truth.get_data_info(index)
        boxes = info["eval_ann_info"]["gt_bboxes_3d"]
        array = boxes.tensor.numpy().copy()
        array[:, 2] += array[:, 5] / 2
        labels = np.asarray(info["eval_ann_info"]["gt_labels_3d"])
        records[float(info["timestamp"])] = Detections(array, np.full(len(array), 0.9, np.float32), labels)
    runner = StreamRunner(base / "float32")
    monkeypatch.setattr(runner, "run", lambda frame: frame)
    monkeypatch.setattr(runner, "decode", lambda frame: records[min(records, key=lambda t: abs(t - frame.timestamp))])
    found = evaluate_deployment(config, model.data_preprocessor, runner)
    present = {int(label) for record in records.values() for label in record.labels}
    assert found["mAP"] == pytest.approx(len(present) / 10) and len(present) > 2  # the devkit averages over ten classes


def test_without_test_data_there_is_no_accuracy(setup):
    config, model, base = setup
    bare = Config({"model": config.model.to_dict()})
    with pytest.raises(MdpError, match="no test_dataloader and no test_evaluator"):
        evaluate_deployment(bare, model.data_preprocessor, base / "float32")


def test_other_classes_are_refused(setup):
    config, model, base = setup
    config = copy.deepcopy(config)
    config.test_dataloader.dataset.metainfo = {"classes": ["car", "truck"]}
    with pytest.raises(MdpError, match="the data set has the classes"):
        evaluate_deployment(config, model.data_preprocessor, base / "float32")
