"""A frame that no sensor gave, or an engine that lost its way, is named; the stream goes on as if it had not been."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime.stream import StreamRunner

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def runner(tiny_deployment):
    return StreamRunner(tiny_deployment)


def edited(array, index, value):
    array = np.array(array)
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: dict(lidar2img=edited(f.lidar2img, (2, 0, 0), NAN)), "lidar2img of CAM_FRONT_LEFT: holds NaN"),
        (lambda f: dict(lidar2img=3 * f.lidar2img), "lidar2img of CAM_FRONT.* rigid"),
        (lambda f: dict(intrinsics=edited(f.intrinsics, (2, 0, 0), NAN)), "intrinsics of CAM_FRONT_LEFT: holds NaN"),
        (lambda f: dict(intrinsics=edited(f.intrinsics, (2, 0, 0), 0)), "focal lengths 0 and"),
        (lambda f: dict(intrinsics=f.intrinsics[:, :3, :3]), r"\(6, 3, 3\)"),
        (lambda f: dict(ego_pose=edited(f.ego_pose, (0, 3), 1e5)), "ego_pose jumps by"),
        (lambda f: dict(ego_pose=2 * f.ego_pose), "ego_pose must be a rigid"),
        (lambda f: dict(ego_pose=np.diag([1.0, 1, -1, 1]) @ f.ego_pose), "determinant -1"),
        (lambda f: dict(timestamp=1e9 * f.timestamp), "looks like nanoseconds"),
        (lambda f: dict(timestamp=int(1e6 * f.timestamp)), "looks like microseconds"),
        (lambda f: dict(timestamp=f.timestamp + 3600), r"advances by 3600.* s inside a scene"),
        (lambda f: dict(timestamp="soon"), "not a number of seconds"),
        (lambda f: dict(prev_exists="false"), "prev_exists is 'false'"),
        (lambda f: dict(img=np.full_like(f.img, 128)), "'img' of CAM_FRONT reaches 128"),
        (lambda f: dict(img=edited(f.img, (3, 1, 5, 5), 1e5)), "'img' of CAM_BACK reaches 100000"),
        (lambda f: dict(img=edited(f.img, (3, 1, 5, 5), INF)), "'img' of CAM_BACK holds NaN or infinity"),
    ],
)
def test_implausible_frames_are_named_and_leave_the_stream(runner, stream, change, message):
    first, second = stream[0], replace(stream[1], scene_token=stream[0].scene_token)
    runner.reset()
    runner.run(first)
    expected = runner.run(second).cls_scores
    runner.reset()
    runner.run(first)
    with pytest.raises(DeploymentError, match=message):
        runner.run(replace(second, **change(second)))
    np.testing.assert_array_equal(runner.run(second).cls_scores, expected)


@pytest.mark.parametrize(
    ("engine", "output"),
    [
        ("_encoder", "img_feats"),
        ("_head", "all_cls_scores"),
        ("_head", "post_memory_embedding"),
        ("_position", "pos_embed"),
        ("_position", "cone"),
    ],
)
def test_an_engine_that_gives_nan_is_seen_before_activations_hide_it(
    tiny_deployment, stream, monkeypatch, engine, output
):
    runner = StreamRunner(tiny_deployment)
    loaded = getattr(runner, engine)
    whole = loaded.run

    def poisoned(feeds):
        outputs = whole(feeds)
        outputs[output].flat[-1] = NAN
        return outputs

    monkeypatch.setattr(loaded, "run", poisoned)
    with pytest.raises(DeploymentError, match=f"{output} is not finite"):
        runner.run(stream[0])
    assert runner.memory is None
    monkeypatch.undo()
    assert np.isfinite(runner.run(stream[0]).cls_scores).all()


def test_a_long_way_between_scenes_and_after_a_reset_is_no_jump(runner, stream):
    far = replace(stream[1], ego_pose=edited(stream[1].ego_pose, (0, 3), 1e5), timestamp=stream[1].timestamp + 1e6)
    for change in (dict(scene_token="other"), dict(prev_exists=False)):
        runner.reset()
        runner.run(stream[0])
        runner.run(replace(far, **change))
    runner.reset()
    runner.run(far)
