from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mdp_mmdet3d.errors import DeploymentError, FileFormatError
from mdp_mmdet3d.runtime.drive import load_drive, write_drive
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.runtime.preprocess import CameraFrame, preprocess
from mdp_mmdet3d.runtime.pyz import write_runtime
from mdp_mmdet3d.runtime.stream import StreamOutput, StreamRunner
from mdp_mmdet3d.runtime.synthetic import repeat_frames, synthetic_frames
from mdp_mmdet3d.runtime.validate import Requirement, judge, validate

from ..numerics import EPS, LAYER, NETWORK, assert_close

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("validate_fps", ROOT / "tools/validate_fps.py")
validate_fps = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(validate_fps)


class FakeRunner:
    """Takes a scripted time per frame."""

    def __init__(self, clock, milliseconds):
        self.clock, self.milliseconds, self.seen = clock, milliseconds, []

    def reset(self):
        self.seen.append("reset")

    def start(self, frame):
        return False

    def gpu_used_mib(self):
        return None

    def step(self, frame):
        self.clock.now += self.milliseconds(len(self.seen)) / 1e3
        self.seen.append(frame)
        return StreamOutput(np.zeros(1), np.zeros(1), 1.0, 2.0)

    def decode(self, output):
        return None


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_figures_of_a_scripted_run():
    clock = Clock()
    runner = FakeRunner(clock, lambda index: 100.0 if index <= 3 else (40.0 if index % 10 == 0 else 20.0))
    dense = FakeRunner(clock, lambda index: 50.0)
    result = validate(runner, iter(range(103)), 100, Requirement(40, 33.0), warmup=3, dense=dense, clock=clock)
    assert runner.seen[0] == "reset" and runner.seen[1:] == dense.seen[1:] == list(range(103))
    assert len(result.samples_ms) == 100 and result.deadline_misses == 10
    assert result.latency["p50_ms"] == pytest.approx(20) and result.latency["max_ms"] == pytest.approx(40)
    assert result.latency["throughput_fps"] == pytest.approx(1e3 / 22)
    assert result.latency["engines_p50_ms"] == result.latency["engines_settled_ms"] == 3.0
    assert result.speedup == pytest.approx(2.5) and result.dense_latency["p99_ms"] == pytest.approx(50)
    assert not result.met and "10.0% of the frames" in result.failures[0]
    json.dumps(result.to_json(), allow_nan=False)


def test_a_changing_rig_and_the_memory_of_a_gpu_are_figures_of_their_own():
    clock = Clock()

    class Rig(FakeRunner):
        def start(self, frame):
            self.clock.now += 0.055
            return frame % 2 == 0

        def gpu_used_mib(self):
            return 100.0 + len(self.seen)

    result = validate(Rig(clock, lambda _: 39.0), iter(range(12)), 10, Requirement(20, 50.0), warmup=2, clock=clock)
    assert result.met and result.latency["p50_ms"] == pytest.approx(39)
    assert result.rig == {"changes": 5, "p50_ms": pytest.approx(55)}
    assert result.gpu_memory_mib == {"start": 103.0, "end": 113.0, "peak": 113.0}
    still = validate(FakeRunner(clock, lambda _: 1.0), iter(range(4)), 2, Requirement(1, 9), warmup=2, clock=clock)
    assert still.rig is None and still.gpu_memory_mib is None


def test_a_drive_is_read_as_it_runs_and_repeats_as_new_scenes(tiny_deployment, tmp_path, monkeypatch):
    from mdp_mmdet3d.runtime import drive

    frames = camera_frames(DeploymentManifest.load(tiny_deployment), 2)
    write_drive(tmp_path, iter(frames))
    opened = []
    read = drive._image
    monkeypatch.setattr(drive, "_image", lambda path: opened.append(path.name) or read(path))
    stream = drive.repeat_drive(tmp_path)
    assert next(stream).scene_token == "s#0" and len(opened) == 6
    assert [next(stream).scene_token for _ in range(3)] == ["s#0", "s#1", "s#1"] and len(opened) == 24


def test_what_is_missed_is_named():
    still = {"start": 100.0, "end": 101.0, "peak": 101.0}
    assert judge(Requirement(30, 33), 31, 0.01, still) == []
    assert "29.0 FPS" in judge(Requirement(30, 33), 29, 0.0, still)[0]
    assert "leak" in judge(Requirement(30, 33), 31, 0.0, {**still, "end": 300.0})[0]


@pytest.mark.parametrize("values", [(0, 33), (30, -1), (30, 33, 1.0), (float("nan"), 33)])
def test_impossible_requirements_are_refused(values):
    with pytest.raises(DeploymentError):
        Requirement(*values)


def test_a_stream_that_ends_early_is_refused():
    clock = Clock()
    with pytest.raises(DeploymentError, match="ended after 5 frames"):
        validate(FakeRunner(clock, lambda _: 1.0), iter(range(5)), 10, Requirement(1, 1), clock=clock)


def pattern(rng, height, width):
    """Coarse random squares: quick to compress."""
    return rng.integers(0, 256, (height // 100, width // 100, 3), dtype=np.uint8).repeat(100, 0).repeat(100, 1)


def camera_frames(manifest, number=2):
    rng = np.random.default_rng(0)
    height, width = manifest.image.source_size
    calibration = {}
    for index, name in enumerate(manifest.camera_names):
        camera = np.diag([1260.0, 1260.0, 1.0, 1.0])
        camera[:2, 2] = 800.0 + index, 450.0
        calibration[name] = camera
    extrinsics = {name: np.eye(4) for name in manifest.camera_names}
    for index, name in enumerate(manifest.camera_names):
        extrinsics[name][:3, 3] = 0.01 * index
    return [
        CameraFrame(
            images={name: pattern(rng, height, width) for name in manifest.camera_names},
            intrinsics=calibration, lidar2cam=extrinsics, ego_pose=np.eye(4), timestamp=0.5 * index, scene_token="s",
        )
        for index in range(number)
    ]  # fmt: skip


def test_preprocessing_equals_the_training_pipeline(tiny_deployment):
    from projects.streampetr.transforms import evaluation_augmentation

    manifest = DeploymentManifest.load(tiny_deployment)
    raw = camera_frames(manifest, 1)[0]
    frame = preprocess(raw, manifest)
    augmentation = evaluation_augmentation(1600, 900, manifest.image.size)
    for index, name in enumerate(manifest.camera_names):
        pixels = augmentation.apply(raw.images[name]).astype(np.float32)
        expected = (pixels - np.float32(manifest.image.mean)) / np.float32(manifest.image.std)
        np.testing.assert_allclose(frame.img[index], expected.transpose(2, 0, 1), atol=1e-6)
        np.testing.assert_allclose(frame.intrinsics[index], augmentation.matrix @ raw.intrinsics[name])
        np.testing.assert_allclose(frame.lidar2img[index], frame.intrinsics[index] @ raw.lidar2cam[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: {k: v for k, v in i.items() if k != "CAM_BACK"}, "missing .'CAM_BACK'"),
        (lambda i: {**i, "CAM_TOP": i["CAM_BACK"]}, "unknown .'CAM_TOP'"),
        (lambda i: {**i, "CAM_BACK": i["CAM_BACK"][:-1]}, "CAM_BACK"),
        (lambda i: {**i, "CAM_BACK": i["CAM_BACK"].astype(np.float32)}, "float32"),
    ],
)
def test_wrong_cameras_are_refused(tiny_deployment, change, message):
    manifest = DeploymentManifest.load(tiny_deployment)
    raw = camera_frames(manifest, 1)[0]
    wrong = CameraFrame(change(raw.images), raw.intrinsics, raw.lidar2cam, raw.ego_pose, raw.timestamp)
    with pytest.raises(DeploymentError, match=message):
        preprocess(wrong, manifest)


def test_images_that_are_not_finite_are_refused_by_name(tiny_deployment, stream):
    from dataclasses import replace

    runner, other = StreamRunner(tiny_deployment), StreamRunner(tiny_deployment)
    runner.run(stream[0])
    other.run(stream[0])
    img = stream[1].img.copy()
    img[3, 0, 5, 5] = np.nan
    with pytest.raises(DeploymentError, match=runner.manifest.camera_names[3]):
        runner.run(replace(stream[1], img=img))
    np.testing.assert_array_equal(runner.run(stream[1]).cls_scores, other.run(stream[1]).cls_scores)


def test_outputs_that_are_not_finite_reset_the_memory(tiny_deployment, stream, monkeypatch):
    runner = StreamRunner(tiny_deployment)
    runner.run(stream[0])
    run = runner._head.run
    with monkeypatch.context() as patch:
        patch.setattr(runner._head, "run", lambda feeds: {**run(feeds), "all_bbox_preds": np.array([np.inf])})
        with pytest.raises(DeploymentError, match="not finite"):
            runner.run(stream[1])
    fresh = StreamRunner(tiny_deployment)
    np.testing.assert_array_equal(runner.run(stream[1]).cls_scores, fresh.run(stream[1]).cls_scores)


def test_a_drive_is_read_as_it_was_written(tiny_deployment, tmp_path):
    frames = camera_frames(DeploymentManifest.load(tiny_deployment), 1)
    write_drive(tmp_path, frames)
    found = next(load_drive(tmp_path))
    for name, image in frames[0].images.items():
        np.testing.assert_array_equal(found.images[name], image)
        np.testing.assert_array_equal(found.intrinsics[name], frames[0].intrinsics[name])
    (tmp_path / "000000_CAM_BACK.png").write_bytes(b"no image")
    with pytest.raises(FileFormatError, match="CAM_BACK"):
        next(load_drive(tmp_path))


def test_repeated_frames_are_new_scenes(tiny_deployment):
    frames = synthetic_frames(DeploymentManifest.load(tiny_deployment), 2)
    found = [frame for _, frame in zip(range(5), repeat_frames(frames))]
    assert [f.scene_token for f in found] == ["synthetic#0"] * 2 + ["synthetic#1"] * 2 + ["synthetic#2"]


NOT_ON_A_VEHICLE = ("torch", "mmcv", "mmengine", "mmdet", "mmdet3d", "onnx", "scipy", "rich", "matplotlib")


def isolated(*arguments, blocked=NOT_ON_A_VEHICLE):
    """Run Python with everything blocked that a vehicle does not have."""
    code = (
        "import sys, runpy\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                          cwd="/", env=environment, timeout=120)  # fmt: skip


def test_the_one_file_runtime_validates_and_its_status_tells(tiny_deployment, tmp_path):
    runtime = write_runtime(tmp_path / "mdp_runtime.pyz")
    common = ("--num-frames", 4, "--warmup", 1)
    report = tmp_path / "fps.json"
    met = isolated(runtime, "validate_fps", tiny_deployment, "--fps", 1e-3, *common, "--json", report)
    assert met.returncode == 0, met.stderr
    data = json.loads(report.read_text())
    assert data["met"] and len(data["samples_ms"]) == 4 and data["backend"]["name"] == "onnxruntime"
    missed = isolated(runtime, "validate_fps", tiny_deployment, "--fps", 1e6, *common)
    assert missed.returncode == 3 and "MISSED" in missed.stdout
    bad = isolated(runtime, "validate_fps", tmp_path / "nothing", "--fps", 1, *common)
    assert bad.returncode == 2 and "does not exist" in bad.stderr
    plot = ("validate_fps", tiny_deployment, "--fps", 1, *common, "--plot", tmp_path / "t.png")
    without = isolated(runtime, *plot)
    assert without.returncode == 2 and "matplotlib" in without.stderr
    drawn = isolated(runtime, *plot, blocked=("torch", "mmcv", "mmengine", "onnx"))
    assert drawn.returncode in (0, 3) and (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG"), drawn.stderr


def test_the_tool_runs_a_recorded_drive_and_plots(tiny_deployment, tmp_path):
    write_drive(tmp_path / "drive", camera_frames(DeploymentManifest.load(tiny_deployment)))
    done = isolated(ROOT / "tools/validate_fps.py", tiny_deployment, "--fps", 1e-3, "--frames", tmp_path / "drive",
                    "--num-frames", 4, "--warmup", 1, "--dense", tiny_deployment, "--predicted-ms", 10, "--plot",
                    tmp_path / "trace.png", blocked=("torch", "mmcv", "mmengine"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "speed-up" in done.stdout and "predicted_ms" in done.stdout
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_the_runtime_is_reproducible_and_old_python_reads_it(tmp_path):
    import ast

    first, second = write_runtime(tmp_path / "a.pyz"), write_runtime(tmp_path / "b.pyz")
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        for name in archive.namelist():
            ast.parse(archive.read(name), name, feature_version=(3, 8))


@pytest.mark.numerics
def test_prev_exists_input_makes_the_first_frame_exact(deployed_model, stream, tmp_path):
    from projects.streampetr.compare import compare_stream
    from projects.streampetr.export import export_streampetr

    from ..tiny_deployment import CLASS_NAMES, INPUT_SIZE

    folder = tmp_path / "deploy"
    export_streampetr(deployed_model, folder, class_names=CLASS_NAMES, input_size=INPUT_SIZE, prev_exists=True)
    found = compare_stream(deployed_model, folder, stream)
    assert found.max_logits < NETWORK * EPS * 16 and max(found.max_boxes, found.max_memory) < NETWORK * EPS * 64
    runner = StreamRunner(folder)
    expected = runner.run(stream[0])
    # What lies in the memory at a reset does not matter, not even NaN.
    head = runner._head.run
    runner._head.run = lambda feeds: head(
        {k: np.full_like(v, np.nan) if k.startswith("pre_memory") else v for k, v in feeds.items()}
    )
    runner.reset()
    assert_close(runner.run(stream[0]).cls_scores, expected.cls_scores, LAYER)


def test_intrinsics_of_three_rows_are_padded_and_others_named(tiny_deployment):
    manifest = DeploymentManifest.load(tiny_deployment)
    raw = camera_frames(manifest, 1)[0]
    small = replace(raw, intrinsics={name: matrix[:3, :3] for name, matrix in raw.intrinsics.items()})
    np.testing.assert_array_equal(preprocess(small, manifest).intrinsics, preprocess(raw, manifest).intrinsics)
    for what, value in (("intrinsics", np.eye(4)[:2]), ("intrinsics", None), ("lidar2cam", np.full((4, 4), np.nan))):
        wrong = replace(raw, **{what: {**getattr(raw, what), "CAM_BACK": value}})
        with pytest.raises(DeploymentError, match=f"{what} of CAM_BACK at 0.0 s"):
            preprocess(wrong, manifest)


@pytest.mark.parametrize("value", ["false", 1, None])
def test_a_flag_in_a_drive_that_is_no_boolean_is_named(tiny_deployment, tmp_path, value):
    write_drive(tmp_path, camera_frames(DeploymentManifest.load(tiny_deployment)))
    data = json.loads((tmp_path / "drive.json").read_text())
    data["frames"][1]["prev_exists"] = value
    (tmp_path / "drive.json").write_text(json.dumps(data))
    with pytest.raises(FileFormatError, match=r"frame 1 of .*prev_exists is"):
        list(load_drive(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--predicted-ms", "-4"), "must be positive"),
        (("--predicted-ms", "0"), "must be positive"),
        (("--predicted-ms", "nan"), "must be positive"),
        (("--num-frames", "1000000000000"), "timed frames must be in"),
        (("--threads", "100000"), "threads must be in"),
        (("--fps", "nan"), "must be positive"),
        (("--json", "PIPE"), "PIPE: it is a device or pipe"),
        (("--json", "FILE/fps.json"), "is a file, not a folder"),
    ],
)
def test_bad_command_lines_fail_before_the_run(tiny_deployment, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "FILE").write_text("mine")
    os.mkfifo(tmp_path / "PIPE")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["validate_fps", str(tiny_deployment), "--fps", "1", *arguments])
    assert validate_fps.main() == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "PIPE"]
    assert (tmp_path / "PIPE").is_fifo()


def test_a_stop_is_one_line(tiny_deployment, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(validate_fps, "validate", stop)
    monkeypatch.setattr(sys, "argv", ["validate_fps", str(tiny_deployment), "--fps", "1"])
    assert validate_fps.main() == 130
    assert capsys.readouterr().err.strip() == "stopped; nothing was written"
