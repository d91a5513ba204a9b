"""The trained mini model behind the node of each kind, judged by the nuScenes metric."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mdp_mmdet3d.runtime.decode import decode, last_level
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from projects.streampetr.autoware import package_autoware
from projects.streampetr.deployed_accuracy import evaluate_deployment
from projects.streampetr.export import export_streampetr

from ..autoware_node import AutowareHost

ROOT = Path(__file__).resolve().parents[2]
CONFIG, CHECKPOINT = ROOT / "configs/streampetr_mini.py", ROOT / "checkpoints/streampetr_mini.pth"


class HostRunner:
    """Hands the pixels behind a normalised frame to a node's host.

    The cameras of the data set are compensated for the ego motion between their images, so their rig changes with every
    frame, which a vehicle's does not: the position embedding is computed again.
    """

    def __init__(self, trained: DeploymentManifest, folder: Path, node: str) -> None:
        self.folder, self.manifest, self.node = folder, trained, node
        self.host = None
        self.scene = None

    def reset(self):
        self.scene = None

    def run(self, frame):
        image = self.manifest.image
        pixels = frame.img.transpose(0, 2, 3, 1) * np.array(image.std) + np.array(image.mean)
        assert np.abs(pixels - pixels.round()).max() < 1e-3
        if self.host is None:
            self.host = AutowareHost(self.folder, self.node, frame)
        self.host.set_rig(frame)
        if frame.scene_token != self.scene or not frame.prev_exists:
            self.host.reset()
        self.scene = frame.scene_token
        return self.host.run(pixels.round(), frame)

    def decode(self, output):
        classes = len(self.manifest.class_names)
        logits, codes = last_level(
            output[0].reshape(1, classes, -1), output[1].reshape(1, 10, -1), "autoware", self.manifest.num_queries
        )
        return decode(logits, codes, max_detections=self.manifest.max_detections,
                      post_center_range=self.manifest.post_center_range,
                      score_threshold=self.manifest.score_threshold)  # fmt: skip


@pytest.mark.slow
def test_each_node_scores_what_pytorch_scores(tmp_path):
    if not (ROOT / "data/mini_easy").is_dir() or not CHECKPOINT.is_file():
        pytest.skip("no data/mini_easy: python tools/create_mini_nuscenes.py data/mini_easy --easy")
    init_default_scope("mmdet3d")
    config = Config.fromfile(CONFIG)
    config.load_from, config.work_dir, config.log_level = str(CHECKPOINT), str(tmp_path / "work"), "ERROR"
    runner = Runner.from_cfg(config)
    expected = next(value for name, value in runner.test().items() if name.endswith("/mAP_set"))
    model = runner.model.eval()
    options = {"class_names": list(config.class_names), "input_size": (64, 176), "weights": CHECKPOINT.name}
    trained = export_streampetr(model, tmp_path / "native", **options)
    for node, encoding in (("0.52", "rgb8"), ("0.52", "bgr8"), ("0.53", "rgb8")):
        export_streampetr(model, tmp_path / f"{node}-{encoding}", **options, layout="autoware", node=node,
                          camera_encoding=encoding)  # fmt: skip
        package_autoware(tmp_path / f"{node}-{encoding}", tmp_path / f"{node}-{encoding}-package", node)

    def score(package, node):
        host = HostRunner(trained, tmp_path / f"{package}-package", node)
        return evaluate_deployment(config, model.data_preprocessor, host)["mAP_set"]

    found = {"0.52": score("0.52-rgb8", "0.52"), "0.53": score("0.53-rgb8", "0.53")}
    wrong = {
        "RGB model behind 0.52": score("0.53-rgb8", "0.52"),
        "swapped model behind 0.53": score("0.52-bgr8", "0.53"),
    }
    print(f"PyTorch {expected:.4f}", found, wrong)
    assert all(value == pytest.approx(expected, abs=1e-3) for value in found.values())
    # What the nodes do to a graph that was not made for them: else the test would not see a wrong conversion.
    assert all(value < expected - 0.03 for value in wrong.values())
