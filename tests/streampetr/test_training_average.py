"""Exponential moving average of a pruned model's weights: what checkpoints hold, and resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config
from mmengine.runner import Runner

import mdp_mmdet3d.runner  # noqa: F401
from mdp_mmdet3d.adapters import InputShape, trace_space
from mdp_mmdet3d.runner.train_config import add_optional_hooks, choose_start
from mdp_mmdet3d.space.builder import SpaceOptions
from mdp_mmdet3d.surgery.plan import PruningPlan
from projects.streampetr.checkpoint import load_checkpoint

MOMENTUM = 0.25


def train(config: Config, work_dir, iterations: int, resume: str | None = None) -> Runner:
    config = copy.deepcopy(config)
    config.work_dir, config.train_cfg.max_iters = str(work_dir), iterations
    config.experiment_name = f"{work_dir.name}-{iterations}-{bool(resume)}"
    choose_start(config, resume)
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


def test_a_pruned_models_average_is_saved_and_goes_on(mini_config, tmp_path) -> None:
    torch.manual_seed(0)
    space = trace_space(MODELS.build(mini_config.model).eval(), InputShape(6, 64, 176), SpaceOptions(4, 8, 8, 0.0, ()))
    kept = {d.name: (tuple(range(d.options[0])),) * d.copies for d in space.dimensions}
    PruningPlan.from_kept(space, kept, set()).save(tmp_path / "plan.json")
    mini_config.model = dict(type="MDPPrunedModel", architecture=mini_config.model, plan=str(tmp_path / "plan.json"))
    mini_config.ema = dict(momentum=MOMENTUM)
    mini_config.default_hooks.checkpoint.interval = 1
    add_optional_hooks(mini_config)
    train(mini_config, tmp_path / "whole", 4)
    saved = [torch.load(tmp_path / "whole" / f"iter_{i}.pth", weights_only=True) for i in (1, 2, 3, 4)]
    name = "pts_bbox_head.query_embedding.0.weight"
    average = saved[0]["ema_state_dict"][f"module.{name}"]
    for checkpoint in saved[1:]:
        average = torch.lerp(average, checkpoint["ema_state_dict"][f"module.{name}"], MOMENTUM)
        torch.testing.assert_close(checkpoint["state_dict"][name], average, rtol=0, atol=1e-7)
    train(mini_config, tmp_path / "parts", 2)
    train(mini_config, tmp_path / "parts", 4, resume="auto")
    parts = torch.load(tmp_path / "parts" / "iter_4.pth", weights_only=True)
    for key in ("state_dict", "ema_state_dict"):
        torch.testing.assert_close(parts[key], saved[-1][key], rtol=0, atol=0)
    # What tools/test.py and tools/export.py load is the average.
    model = MODELS.build(mini_config.model)
    load_checkpoint(model, tmp_path / "whole" / "iter_4.pth")
    torch.testing.assert_close(model.state_dict()[name], average, rtol=0, atol=1e-7)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(saved[-1]["ema_state_dict"][f"module.{name}"], average, rtol=0, atol=1e-7)
