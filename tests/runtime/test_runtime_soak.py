from __future__ import annotations

from dataclasses import replace

import pytest

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime.disturbance import DISTURBANCES, soak
from mdp_mmdet3d.runtime.stream import StreamRunner


def test_two_hundred_disturbed_frames(tiny_deployment):
    result = soak(StreamRunner(tiny_deployment), 200, cut_share=0.1, bad_share=0.2, check_share=0.5)
    assert result.frames == 200 and result.refused.keys() == DISTURBANCES.keys()
    assert result.resets_checked > 3 and result.wrong_after_reset == 0
    # Kept frames or memories would take 0.8 MiB each; allocators settle in the first half.
    assert result.memory_mib[-1] - result.memory_mib[5] < 20


def test_a_runner_that_keeps_the_past_is_caught(tiny_deployment, monkeypatch):
    runner = StreamRunner(tiny_deployment)
    run = runner.run
    monkeypatch.setattr(runner, "run", lambda frame: run(replace(frame, scene_token="")))
    result = soak(runner, 40, cut_share=0.2, bad_share=0.0, check_share=1.0)
    assert result.wrong_after_reset == result.resets_checked > 0


def test_a_bad_frame_that_passes_is_an_error(tiny_deployment, monkeypatch):
    monkeypatch.setitem(DISTURBANCES, "harmless", lambda frame: frame)
    with pytest.raises(DeploymentError, match="harmless"):
        soak(StreamRunner(tiny_deployment), 60, bad_share=1.0)
