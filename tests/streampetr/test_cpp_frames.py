"""A reader with the rules of the public C++ application finds the recorded outputs with our engines."""

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

from mdp_mmdet3d.errors import DeploymentError
from projects.streampetr.cpp_frames import write_cpp_frames

from ..tiny_deployment import make_frames

MEMORY = ("embedding", "reference_point", "egopose", "velo")


class Engine:
    """A flat buffer per binding, float32, filled from files as far as it is long."""

    def __init__(self, path):
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.buffers = {
            v.name: np.zeros(v.shape, np.float32) for v in (*self.session.get_inputs(), *self.session.get_outputs())
        }

    def load(self, name, path, dtype=np.float32):
        assert path.stat().st_size == self.buffers[name].size * np.dtype(dtype).itemsize, path
        self.buffers[name].flat = np.fromfile(path, dtype).astype(np.float32)

    def run(self):
        names = [v.name for v in self.session.get_outputs()]
        feeds = {v.name: self.buffers[v.name] for v in self.session.get_inputs()}
        for name, value in zip(names, self.session.run(names, feeds)):
            self.buffers[name][...] = value


def application(deployment, data):
    """What ``main`` does, frame by frame: outputs found, and those of the files."""
    backbone, head = Engine(deployment / "image_encoder.onnx"), Engine(deployment / "head.onnx")
    entries = len(list(data.iterdir()))
    clock = None
    for index in range(1, entries):
        frame = data / f"{index:04d}"
        backbone.load("img", frame / "img.bin")
        backbone.run()
        head.buffers["x"][...] = backbone.buffers["img_feats"]
        for name in ("pos_embed", "cone", "data_ego_pose", "data_ego_pose_inv"):
            head.load(name, frame / f"{name}.bin")
        now = np.fromfile(frame / "data_timestamp.bin", np.float64)[0]
        pre = head.buffers["pre_memory_timestamp"]
        if clock is None:
            head.load("pre_memory_timestamp", frame / "prev_memory_timestamp.bin", np.float64)
            for name in MEMORY:
                head.load(f"pre_memory_{name}", frame / f"init_memory_{name}.bin")
        else:
            pre.flat = clock[: pre.size] + now
        head.run()
        clock = head.buffers["post_memory_timestamp"].ravel().astype(np.float64) - now
        for name in MEMORY:
            pre = head.buffers[f"pre_memory_{name}"]
            pre.flat = head.buffers[f"post_memory_{name}"].ravel()[: pre.size]
        for name in ("all_cls_scores", "all_bbox_preds"):
            yield head.buffers[name].ravel().copy(), np.fromfile(frame / f"{name}.bin", np.float32)


def test_the_application_finds_what_was_recorded(tiny_deployment, tmp_path):
    assert write_cpp_frames(tiny_deployment, make_frames(3, reset_at=9), tmp_path / "data") == 3
    results = list(application(tiny_deployment, tmp_path / "data"))
    assert len(results) == 6
    for found, recorded in results:
        assert found.shape == recorded.shape
        assert np.abs(found - recorded).max() < 1e-4 * np.abs(recorded).max()
    first, last = results[0][1], results[4][1]
    assert np.abs(first - last).max() > 1e-2  # frames differ


def test_a_memory_that_was_not_recorded_shows(tiny_deployment, tmp_path):
    data = tmp_path / "data"
    write_cpp_frames(tiny_deployment, make_frames(1), data)
    path = data / "0001" / "init_memory_reference_point.bin"
    (np.fromfile(path, np.float32) + 10).tofile(path)
    found, recorded = next(application(tiny_deployment, data))
    assert np.abs(found - recorded).max() > 1e-3 * np.abs(recorded).max()


def test_what_the_application_cannot_read_is_refused(tiny_deployment, tmp_path):
    frames = make_frames(3, reset_at=2)
    for given, message in (
        ([], "no frame"),
        (frames, "frame 3 begins another scene"),
        ([frames[0], replace(frames[1], prev_exists=False)], "frame 2 begins another scene"),
    ):
        with pytest.raises(DeploymentError, match=message):
            write_cpp_frames(tiny_deployment, given, tmp_path / "data")
    assert not list(tmp_path.iterdir())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "other").touch()
    with pytest.raises(DeploymentError, match="not empty"):
        write_cpp_frames(tiny_deployment, frames[:1], tmp_path / "data")
