"""A host that knows nothing but the Autoware protocol runs the package and finds the boxes of the Python runtime."""

from __future__ import annotations

import errno
import os

import numpy as np
import onnxruntime as ort
import pytest
import yaml

from mdp_mmdet3d.errors import DeploymentError, WriteError
from mdp_mmdet3d.runtime.decode import decode, last_level
from mdp_mmdet3d.runtime.stream import HostMemory, StreamRunner
from projects.streampetr import autoware
from projects.streampetr.autoware import MODEL_PARAMETERS, NODE_PARAMETERS, NodeSettings, package_autoware
from projects.streampetr.export import export_streampetr

from ..tiny_deployment import CLASS_NAMES, INPUT_SIZE, make_frames

MEMORY = ("embedding", "reference_point", "timestamp", "egopose", "velo")


@pytest.fixture(scope="module")
def package(deployed_model, tmp_path_factory):
    base = tmp_path_factory.mktemp("autoware")
    export_streampetr(deployed_model, base / "deploy", class_names=CLASS_NAMES, input_size=INPUT_SIZE,
                      layout="autoware", weights="random")  # fmt: skip
    files = package_autoware(base / "deploy", base / "package")
    return base / "deploy", base / "package", files


class AutowareHost:
    """The node's host code as documented: flat byte buffers, zero reset, poses relative to the first translation."""

    def __init__(self, folder, rig):
        def session(name):
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            return ort.InferenceSession(str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])

        self.parameters = yaml.safe_load((folder / MODEL_PARAMETERS).read_text())["/**"]["ros__parameters"][
            "model_params"
        ]
        self.encoder, self.head = session("image_encoder"), session("head")
        self.shapes = {value.name: value.shape for value in self.head.get_inputs()}
        self.buffers = {name: bytearray(4 * int(np.prod(shape))) for name, shape in self.shapes.items()}
        size = [self.parameters["input_image_height"], self.parameters["input_image_width"], 3]
        embedding = session("position_embedding").run(
            ["pos_embed", "cone"],
            {"img_metas_pad": np.array(size, np.float32), "intrinsics": rig[0], "img2lidar": rig[1]},
        )
        self.write("pos_embed", embedding[0])
        self.write("cone", embedding[1])
        self.reset()

    def reset(self):
        for name in MEMORY:
            self.buffers[f"pre_memory_{name}"][:] = bytes(len(self.buffers[f"pre_memory_{name}"]))
        self.clock = np.zeros(self.parameters["post_memory_length"], np.float32)
        self.start = self.origin = None

    def write(self, name, array):
        target = self.buffers[name]
        target[:] = np.ascontiguousarray(array, np.float32).tobytes()[: len(target)]

    def run(self, frame):
        if self.start is None:
            self.start, self.origin = frame.timestamp, frame.ego_pose[:3, 3].copy()
        now = np.float32(frame.timestamp - self.start)
        pose = frame.ego_pose.copy()
        pose[:3, 3] -= self.origin
        self.write("x", self.encoder.run(["img_feats"], {"img": frame.img[None]})[0])
        self.write("data_ego_pose", pose)
        self.write("data_ego_pose_inv", np.linalg.inv(pose))
        self.write("pre_memory_timestamp", self.clock[: self.parameters["pre_memory_length"]] + now)
        feeds = {n: np.frombuffer(self.buffers[n], np.float32).reshape(s) for n, s in self.shapes.items()}
        names = [value.name for value in self.head.get_outputs()]
        results = dict(zip(names, self.head.run(names, feeds)))
        self.clock = results["post_memory_timestamp"].ravel() - now
        for name in set(MEMORY) - {"timestamp"}:
            self.write(f"pre_memory_{name}", results[f"post_memory_{name}"])
        return self.boxes(results["all_cls_scores"].ravel(), results["all_bbox_preds"].ravel())

    def boxes(self, scores, codes):
        count, classes = self.parameters["num_proposals"], self.parameters["class_names"]
        found = []
        for j in range(count):
            values = [1 / (1 + np.exp(-scores[c * count + j])) for c in range(len(classes))]
            label = int(np.argmax(values))
            box = [codes[k * count + j] for k in range(10)]
            yaw = np.arctan2(box[6], box[7])
            found.append((label, values[label], [*box[:3], *np.exp(box[3:6]), np.sin(yaw), np.cos(yaw), *box[8:]]))
        return found


def zero_memory(runner, frame):
    """What the node starts from, as the Python runtime's state."""
    start = runner.initial_memory(frame.ego_pose, frame.timestamp)
    zero = {name: np.zeros_like(getattr(start, name)) for name in ("embedding", "reference_point", "egopose", "velo")}
    return HostMemory(**zero, clock=start.clock, anchor=start.anchor)


def test_twenty_frames_of_the_documented_protocol(package):
    deployment, folder, _ = package
    frames = make_frames(20, reset_at=20)
    rig = (frames[0].intrinsics[None].astype(np.float32), np.linalg.inv(frames[0].lidar2img)[None].astype(np.float32))
    host, runner = AutowareHost(folder, rig), StreamRunner(deployment)
    # Starting a scene makes the exact first memory; the node's is put in its place.
    runner.memory, runner._scene = zero_memory(runner, frames[0]), frames[0].scene_token
    for frame in frames:
        found = host.run(frame)
        output = runner.run(frame)
        logits, codes = last_level(output.cls_scores, output.bbox_preds, "autoware", runner.manifest.num_queries)
        expected = decode(logits, codes, max_detections=logits.size, post_center_range=(-1e9,) * 3 + (1e9,) * 3)
        yaw = expected.boxes[:, 6:7]
        rows = np.concatenate([expected.boxes[:, :6], np.sin(yaw), np.cos(yaw), expected.boxes[:, 7:]], axis=1)
        for label, score, box in found:
            same = expected.labels == label
            gaps = np.abs(rows[same] - box).max(axis=1)
            assert gaps.min() < 5e-3
            assert abs(expected.scores[same][gaps.argmin()] - score) < 1e-4


def test_parameters_follow_from_the_model(package):
    _, folder, files = package
    assert files == ["README.md", NODE_PARAMETERS, "head.onnx", "image_encoder.onnx", MODEL_PARAMETERS,
                     "position_embedding.onnx"]  # fmt: skip
    model = yaml.safe_load((folder / MODEL_PARAMETERS).read_text())["/**"]["ros__parameters"]["model_params"]
    assert (model["num_proposals"], model["pre_memory_length"], model["post_memory_length"]) == (76, 64, 80)
    assert (model["rois_number"], model["input_image_height"], model["input_image_width"]) == (6, 64, 176)
    assert model["class_names"][0] == "CAR" and len(model["detection_range"]) == 6
    node = yaml.safe_load((folder / NODE_PARAMETERS).read_text())["/**"]["ros__parameters"]
    thresholds = dict(zip(CLASS_NAMES, node["post_process_params"]["yaw_norm_thresholds"]))
    assert thresholds["pedestrian"] == 0.0 and thresholds["car"] == 0.3
    text = (folder / "README.md").read_text()
    assert "construction_vehicle become UNKNOWN" in text and "0. CAM_FRONT" in text and "RGB order" in text


def test_what_the_node_cannot_run_is_refused(package, tiny_deployment, tmp_path):
    deployment, folder, _ = package
    with pytest.raises(DeploymentError, match="--layout autoware"):
        package_autoware(tiny_deployment, tmp_path / "out")
    with pytest.raises(DeploymentError, match="int8"):
        package_autoware(deployment, tmp_path / "out", NodeSettings(precision="int8"))
    with pytest.raises(DeploymentError, match="not empty"):
        package_autoware(deployment, folder)


def test_a_package_that_cannot_be_written_is_not_there(package, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(autoware, "readme", full)
        with pytest.raises(WriteError, match=r"cannot write .*package: No space left on device"):
            package_autoware(package[0], tmp_path / "package")
    assert not list(tmp_path.iterdir())
    assert package_autoware(package[0], tmp_path / "package") == package[2]
