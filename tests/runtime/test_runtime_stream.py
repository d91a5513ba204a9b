from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime.decode import decode, last_level
from mdp_mmdet3d.runtime.ort_engine import OrtEngine
from mdp_mmdet3d.runtime.stream import StreamRunner
from mdp_mmdet3d.runtime.synthetic import synthetic_frames

from ..numerics import (
    COLUMNS,
    GEOMETRY,
    array,
    assert_close,
    assert_decided,
    assert_differs,
    assert_same_rows,
    pair_rows,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runner(tiny_deployment):
    return StreamRunner(tiny_deployment)


def run_all(runner, frames):
    outputs = [runner.run(frame) for frame in frames]
    return np.stack([output.cls_scores for output in outputs]), np.stack([output.bbox_preds for output in outputs])


def test_first_frame_state_is_exact(runner, deployed_model, stream):
    frame = stream[0]
    memory = runner.initial_memory(frame.ego_pose, frame.timestamp)
    head = deployed_model.pts_bbox_head
    expected = head.initial_memory(torch.eye(4)[None])
    for name, value in (
        ("embedding", memory.embedding),
        ("reference_point", memory.reference_point),
        ("egopose", memory.egopose),
        ("velo", memory.velo),
    ):
        np.testing.assert_array_equal(value, getattr(expected, name).detach().numpy(), err_msg=name)
    np.testing.assert_array_equal(memory.clock + frame.timestamp, 0.0)
    np.testing.assert_array_equal(memory.anchor, frame.ego_pose)


@pytest.mark.numerics
def test_global_protocol_gives_the_same_boxes(runner, tiny_deployment, deployed_model, stream):
    """A host that follows docs/deployment.md section 3 with global float32 poses agrees with the anchored runner."""
    head_engine = OrtEngine(tiny_deployment / "head.onnx")
    encoder = OrtEngine(tiny_deployment / "image_encoder.onnx")
    frames = [replace(frame, scene_token="one") for frame in stream]
    # float32 poses need coordinates near the origin, as that section says.
    origin = frames[0].ego_pose[:3, 3].copy()
    clock, pre = None, {}
    for frame in frames:
        output = runner.run(frame)
        pose = frame.ego_pose.copy()
        pose[:3, 3] -= origin
        if clock is None:
            memory = deployed_model.pts_bbox_head.initial_memory(torch.tensor(pose, dtype=torch.float32)[None])
            pre = {f"pre_memory_{key}": value.detach().numpy() for key, value in memory._asdict().items()}
        else:
            pre["pre_memory_timestamp"] = (clock[:, :64] + frame.timestamp).astype(np.float32)
        feeds = {
            "x": encoder.run({"img": frame.img[None]})["img_feats"],
            "data_ego_pose": pose[None].astype(np.float32),
            "data_ego_pose_inv": np.linalg.inv(pose)[None].astype(np.float32),
            **runner._rig_outputs,
            **pre,
        }
        result = head_engine.run(feeds)
        clock = result["post_memory_timestamp"].astype(np.float64) - frame.timestamp
        pre = {
            f"pre_memory_{key}": result[f"post_memory_{key}"][:, :64]
            for key in ("embedding", "reference_point", "egopose", "velo")
        }
        assert_same_queries(
            (result["all_cls_scores"], result["all_bbox_preds"]), (output.cls_scores, output.bbox_preds)
        )


def assert_same_queries(found, expected):
    """Logits and boxes of a frame of two free-running streams; the memory's choice must be clear for the next one."""
    assert_decided(found[0][0, 0], expected[0][0, 0], [16], aligned=60)
    for ours, theirs, scale in zip(found, expected, ({}, {"limit": COLUMNS, "columns": True})):
        assert_close(ours[0, 0, :60], theirs[0, 0, :60], **scale)
        # Near-ties may swap propagated queries, which come behind the 60 learned ones.
        assert_same_rows(ours[0, 0, 60:], theirs[0, 0, 60:], **scale)


@pytest.mark.numerics
def test_boxes_do_not_depend_on_where_the_global_origin_is(runner, stream):
    scores, boxes = run_all(runner, stream)
    move = np.eye(4)
    move[:2, :2] = [[0.6, -0.8], [0.8, 0.6]]
    move[:3, 3] = [384_000.0, 5_820_000.0, 60.0]
    runner.reset()
    moved_scores, moved_boxes = run_all(runner, [replace(f, ego_pose=move @ f.ego_pose) for f in stream])
    for index in range(len(stream)):
        assert_same_queries((moved_scores[index], moved_boxes[index]), (scores[index], boxes[index]))


@pytest.mark.numerics
def test_the_past_matters_and_a_reset_forgets_it(runner, tiny_deployment, stream):
    fresh = StreamRunner(tiny_deployment).run(stream[1])
    runner.run(stream[0])
    with_past = runner.run(stream[1])
    assert_differs(with_past.cls_scores, fresh.cls_scores)
    runner.reset()
    np.testing.assert_array_equal(runner.run(stream[1]).cls_scores, fresh.cls_scores)
    runner.run(stream[2])
    cut = replace(stream[3], prev_exists=False)
    np.testing.assert_array_equal(runner.run(cut).cls_scores, StreamRunner(tiny_deployment).run(cut).cls_scores)


def test_a_new_scene_resets_even_if_time_goes_back(runner, tiny_deployment, stream):
    runner.run(stream[3])
    early = replace(stream[0], scene_token="another")
    np.testing.assert_array_equal(runner.run(early).cls_scores, StreamRunner(tiny_deployment).run(early).cls_scores)


def test_time_must_advance_inside_a_scene(runner, stream):
    runner.run(stream[1])
    with pytest.raises(DeploymentError, match="does not come after"):
        runner.run(stream[0])
    with pytest.raises(DeploymentError, match="number of seconds"):
        runner.run(replace(stream[1], timestamp=float("nan")))


@pytest.mark.parametrize("change", [{}, {"scene_token": "another"}, {"prev_exists": False}])
def test_a_refused_frame_leaves_the_stream_as_it_was(runner, tiny_deployment, stream, change):
    undisturbed = StreamRunner(tiny_deployment)
    undisturbed.run(stream[0])
    runner.run(stream[0])
    with pytest.raises(DeploymentError, match="'img'"):
        runner.run(replace(stream[1], img=stream[1].img[:5], **change))
    np.testing.assert_array_equal(runner.run(stream[1]).cls_scores, undisturbed.run(stream[1]).cls_scores)


def test_position_embedding_runs_once_per_rig(runner, stream, monkeypatch):
    calls = []
    run = runner._position.run
    monkeypatch.setattr(runner._position, "run", lambda feeds: calls.append(1) or run(feeds))
    run_all(runner, stream)
    assert len(calls) == 1
    runner.reset()
    shifted = stream[0].lidar2img.copy()
    shifted[0, 0, 3] += 1.0
    runner.run(replace(stream[0], lidar2img=shifted))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ego_pose": np.eye(3)}, "ego_pose"),
        ({"ego_pose": np.full((4, 4), np.nan)}, "ego_pose"),
        ({"ego_pose": np.zeros((4, 4))}, "ego_pose"),
        ({"intrinsics": np.zeros((5, 4, 4))}, "intrinsics"),
        ({"lidar2img": np.zeros((6, 4, 4))}, "calibration"),
        ({"img": np.zeros((6, 3, 64, 160), np.float32)}, "'img'"),
        ({"img": np.zeros((6, 3, 64, 176))}, "float64"),
    ],
)
def test_wrong_frames_are_refused(runner, stream, change, message):
    with pytest.raises(DeploymentError, match=message):
        runner.run(replace(stream[0], **change))


def test_a_step_without_rig_is_refused(runner, stream):
    with pytest.raises(DeploymentError, match="set_rig"):
        runner.step(stream[0])


@pytest.mark.numerics
def test_decoding_equals_the_models_box_coder(runner, deployed_model, stream):
    output = runner.run(stream[0])
    found = runner.decode(output)
    expected = deployed_model.bbox_coder.decode(
        torch.from_numpy(output.cls_scores[-1]), torch.from_numpy(output.bbox_preds[-1])
    )[0]
    assert len(found.boxes) == len(expected.bboxes) > 0
    assert_close(found.scores, expected.scores, GEOMETRY)
    # Probabilities that round to the same number come in any order.
    rows = [np.column_stack([array(x), 1e3 * array(y)]) for x, y in ((found.boxes, found.labels),
                                                                     (expected.bboxes, expected.labels))]  # fmt: skip
    order, choices = pair_rows(*rows, array(expected.scores), margin=4 * float(np.finfo(np.float32).eps))
    np.testing.assert_array_equal(found.labels, array(expected.labels)[order])
    assert_close(found.boxes, array(expected.bboxes)[order], GEOMETRY, columns=True)
    assert (choices > 1).mean() < 0.2


def test_decode_limits_thresholds_and_range():
    logits = np.array([[3.0, -9.0], [2.0, 1.0], [-9.0, 0.0]], np.float32)
    codes = np.zeros((3, 10), np.float32)
    codes[:, 7] = 1.0
    codes[1, 0] = 100.0
    limits = (-50, -50, -5, 50, 50, 5)
    found = decode(logits, codes, max_detections=4, post_center_range=limits)
    assert found.labels.tolist() == [0, 1]
    np.testing.assert_allclose(found.scores, 1 / (1 + np.exp([-3.0, 0.0])), rtol=1e-6)
    np.testing.assert_array_equal(found.boxes[:, 3:6], 1.0)
    assert len(decode(logits, codes, max_detections=1, post_center_range=limits).boxes) == 1
    assert len(decode(logits, codes, max_detections=4, post_center_range=limits, score_threshold=0.6).boxes) == 1


def test_both_layouts_hold_the_last_level():
    rng = np.random.default_rng(0)
    scores, boxes = rng.random((3, 1, 7, 4)), rng.random((3, 1, 7, 10))
    native = last_level(scores, boxes, "native", 7)
    # Class-major, then level-major columns: element (class c, level l, query q) at c * (3 * 7) + l * 7 + q.
    flat = [value[:, 0].transpose(2, 0, 1).reshape(1, value.shape[-1], 21) for value in (scores, boxes)]
    for a, b in zip(native, last_level(*flat, "autoware", 7)):
        np.testing.assert_array_equal(a, b)


def test_the_runtime_imports_neither_torch_nor_mmdetection():
    code = (
        "import sys, mdp_mmdet3d.runtime\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(names & {'torch', 'mmcv', 'mmengine', 'mmdet', 'mmdet3d', 'onnx', 'projects'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_synthetic_frames_run(runner, tiny_deployment):
    frames = synthetic_frames(runner.manifest, count=2)
    scores, boxes = run_all(runner, frames)
    assert np.isfinite(scores).all() and np.isfinite(boxes).all()
    # Straight ahead of the first camera is the middle of its image.
    ahead = frames[0].lidar2img[0] @ [0.0, 10.0, 0.0, 1.0]
    np.testing.assert_allclose(ahead[:2] / ahead[2], [88.0, 32.0])
