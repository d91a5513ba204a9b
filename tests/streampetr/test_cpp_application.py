"""A reader with the rules of the public C++ application finds the recorded outputs with our engines."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime.drive import write_drive
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.runtime.ort_engine import OrtEngine
from mdp_mmdet3d.runtime.preprocess import CameraFrame
from mdp_mmdet3d.runtime.stream import StreamRunner
from projects.streampetr import cpp_application
from projects.streampetr.cpp_application import package_cpp

from ..numerics import COLUMNS, NETWORK, assert_close, assert_decided
from ..tiny_deployment import make_frames

ROOT = Path(__file__).resolve().parents[2]
MEMORY = ("embedding", "reference_point", "egopose", "velo")


class Binding(dict):
    """One buffer per tensor of an engine, filled from files by position, whatever the shape."""

    def __init__(self, path):
        self.engine = OrtEngine(path)
        tensors = {**self.engine.inputs, **self.engine.outputs}
        assert {spec.dtype for spec in tensors.values()} == {"float32"}  # the element size of the reader's load
        super().__init__({name: np.full(spec.shape, np.nan, np.float32) for name, spec in tensors.items()})

    def load(self, name, path, dtype=np.float32):
        values = np.fromfile(path, dtype)
        assert values.size == self[name].size, path  # the reader takes what is there and says nothing
        self[name].flat = values.astype(np.float32)

    def run(self):
        self.update(self.engine.run({name: self[name] for name in self.engine.inputs}))


def application(folder):
    """What its ``main`` does: for each frame the outputs found, and those of the files."""
    backbone = Binding(folder / "onnxfiles" / "simplify_extract_img_feat.onnx")
    head = Binding(folder / "onnxfiles" / "simplify_pts_head_memory.onnx")
    entries = len(list((folder / "data").iterdir()))
    clock = None
    for index in range(1, entries):
        frame = folder / "data" / f"{index:04d}"
        backbone.load("img", frame / "img.bin")
        backbone.run()
        head["x"].flat = backbone["img_feats"].ravel()
        for name in ("pos_embed", "cone"):
            head.load(name, frame / f"{name}.bin")
        now = np.fromfile(frame / "data_timestamp.bin", np.float64)[0]
        if clock is None:
            head.load("pre_memory_timestamp", frame / "prev_memory_timestamp.bin", np.float64)
            for name in MEMORY:
                head.load(f"pre_memory_{name}", frame / f"init_memory_{name}.bin")
        else:
            pre = head["pre_memory_timestamp"]
            pre.flat = clock[: pre.size] + now
        for name in ("data_ego_pose", "data_ego_pose_inv"):
            head.load(name, frame / f"{name}.bin")
        head.run()
        clock = head["post_memory_timestamp"].ravel().astype(np.float64) - now
        for name in MEMORY:
            pre = head[f"pre_memory_{name}"]
            pre.flat = head[f"post_memory_{name}"].ravel()[: pre.size]
        names = ("all_cls_scores", "all_bbox_preds")
        yield [(head[name].copy(), np.fromfile(frame / f"{name}.bin", np.float32)) for name in names]


@pytest.fixture(scope="module")
def folder(tiny_deployment, tmp_path_factory):
    out = tmp_path_factory.mktemp("cpp") / "app"
    assert package_cpp(tiny_deployment, iter(make_frames(3, reset_at=9)), out, memory_edited=True) == 3
    return out


def test_the_application_finds_the_boxes_of_our_runtime(folder, tiny_deployment):
    assert sorted(path.name for path in (folder / "data").iterdir()) == ["0000", "0001", "0002", "0003"]
    runner = StreamRunner(tiny_deployment)
    results = list(application(folder))
    assert len(results) == 3
    for frame, ((scores, kept_scores), (codes, kept_codes)) in zip(make_frames(3, reset_at=9), results):
        output = runner.run(frame)
        np.testing.assert_array_equal(kept_scores, output.cls_scores.ravel())
        np.testing.assert_array_equal(kept_codes, output.bbox_preds.ravel())
        assert_decided(scores, output.cls_scores, [16])
        assert_close(scores, output.cls_scores, NETWORK)
        assert_close(codes, output.bbox_preds, COLUMNS, columns=True)
    first, last = results[0][1][0], results[2][1][0]
    assert np.abs(first - last).max() > 1e-2  # frames differ


@pytest.mark.parametrize(
    "name", ["prev_memory_timestamp", "init_memory_reference_point", "init_memory_egopose", "data_ego_pose_inv"]
)
def test_a_wrong_file_shows(name, folder, tmp_path):
    for source in folder.rglob("*"):
        target = tmp_path / source.relative_to(folder)
        target.mkdir(parents=True) if source.is_dir() else target.symlink_to(source)
    path = next(p for p in sorted(tmp_path.rglob(f"{name}.bin")) if name != "data_ego_pose_inv" or "0002" in p.parts)
    values = np.fromfile(path, np.float64 if "timestamp" in name else np.float32)
    path.unlink()
    (values + 3).tofile(path)
    worst = max(np.abs(found.ravel() - kept).max() for frame in application(tmp_path) for found, kept in frame)
    assert worst > 1e-2


def test_times_keep_their_resolution(folder):
    frames = make_frames(3, reset_at=9)
    for number, frame in enumerate(frames, start=1):
        stored = np.fromfile(folder / f"data/{number:04d}/data_timestamp.bin", np.float64)
        np.testing.assert_array_equal(stored, [frame.timestamp])
    text = (folder / "README.md").read_text()
    assert "64 rows that are read and 80 that are written" in text and "--stronglyTyped" not in text


def test_frames_that_the_application_cannot_follow_are_refused(tiny_deployment, tmp_path):
    frames = make_frames(3, reset_at=2)
    tilted = np.diag([1.0, 2.0, 1.0, 1.0])
    for given, message in (
        ([], "no frame to write"),
        (frames, "frame 3 begins another scene"),
        ([frames[0], replace(frames[1], prev_exists=False)], "frame 2 begins another scene"),
        ([replace(frames[0], ego_pose=tilted)], "ego_pose"),
    ):
        with pytest.raises(DeploymentError, match=message):
            package_cpp(tiny_deployment, given, tmp_path / "app", memory_edited=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "mine").touch()
    with pytest.raises(DeploymentError, match="not an empty folder"):
        package_cpp(tiny_deployment, frames[:1], tmp_path / "app", memory_edited=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["app", "mine"]


def test_a_deployment_that_the_application_does_not_run_is_refused(tiny_deployment, monkeypatch, tmp_path):
    with pytest.raises(DeploymentError, match=r"64 rows read and 80 written, the application has 512 and 640"):
        package_cpp(tiny_deployment, make_frames(1), tmp_path / "app")
    manifest = DeploymentManifest.load(tiny_deployment)
    encoder, head = (manifest.engines[name] for name in ("image_encoder", "head"))
    image = replace(encoder.inputs[0], shape=(1, 1, *encoder.inputs[0].shape[2:]))
    starts = replace(head.inputs[0], name="prev_exists", shape=(1,))
    for changes, message in (
        ({"layout": "autoware"}, "layout 'autoware'"),
        ({"engines": {**manifest.engines, "head": replace(head, inputs=(*head.inputs, starts))}}, "prev_exists"),
        ({"engines": {**manifest.engines, "image_encoder": replace(encoder, inputs=(image,))}}, "one camera at a time"),
    ):
        with pytest.raises(DeploymentError, match=message):
            cpp_application._check(replace(manifest, **changes), tiny_deployment, memory_edited=True)
    assert not list(tmp_path.iterdir())


def test_the_tool_reads_a_recorded_drive(tiny_deployment, tmp_path):
    manifest = DeploymentManifest.load(tiny_deployment)
    camera = np.array([[560.0, 0, 352], [0, 560, 180], [0, 0, 1]])
    height, width = manifest.image.source_size
    frames = [
        CameraFrame(
            images={name: np.full((height, width, 3), 90, np.uint8) for name in manifest.camera_names},
            intrinsics=dict.fromkeys(manifest.camera_names, camera),
            lidar2cam=dict.fromkeys(manifest.camera_names, np.eye(4)),
            ego_pose=np.eye(4),
            timestamp=1.6e9 + 0.5 * index,
            scene_token="drive",
        )
        for index in range(2)
    ]
    write_drive(tmp_path / "drive", frames)

    def tool(*options):
        command = [sys.executable, "tools/package_cpp.py", str(tiny_deployment), str(tmp_path / "app"), *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    refused = tool("--frames", str(tmp_path / "drive"))
    assert refused.returncode == 2 and "--memory-edited" in refused.stderr and not (tmp_path / "app").exists()
    done = tool("--frames", str(tmp_path / "drive"), "--num-frames", "1", "--memory-edited")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "app").iterdir()) == ["README.md", "data", "onnxfiles"]
    assert sorted(path.name for path in (tmp_path / "app" / "data").iterdir()) == ["0000", "0001"]
