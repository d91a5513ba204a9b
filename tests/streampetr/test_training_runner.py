"""MMEngine's runner trains, stops, goes on and evaluates, dense and pruned."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

import mdp_mmdet3d.runner  # noqa: F401
from mdp_mmdet3d.errors import StructureMismatchError
from projects.streampetr.train_loop import STATE_KEY, random_state, set_random_state

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def run(config: Config, work_dir: Path, iterations: int, resume: str | None = None) -> Runner:
    config = copy.deepcopy(config)
    config.work_dir = str(work_dir)
    config.experiment_name = f"{work_dir.name}-{iterations}-{bool(resume)}"
    config.train_cfg.max_iters = iterations
    if resume:
        config.resume, config.load_from = True, resume
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


def weights(runner: Runner) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in runner.model.state_dict().items()}


@pytest.mark.slow
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(mini_config, tmp_path) -> None:
    # Dropout and random crops: the random generators matter, not only the weights.
    mini_config.model.pts_bbox_head.decoder.update(dropout=0.1)
    for step in mini_config.train_dataloader.dataset.pipeline:
        if step["type"] == "RandomResizeCropFlip":
            step.update(resize_range=(1.0, 1.2), flip_prob=0.5)
    whole = run(mini_config, tmp_path / "whole", 5)
    run(mini_config, tmp_path / "parts", 3)
    resumed = run(mini_config, tmp_path / "parts", 5, resume=str(tmp_path / "parts" / "iter_3.pth"))
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    for ours, theirs in zip(resumed.model.memory, whole.model.memory):
        assert torch.equal(ours, theirs)
    other = copy.deepcopy(mini_config)
    other.custom_hooks = [hook for hook in other.custom_hooks if hook["type"] != "StreamStateHook"]
    run(other, tmp_path / "forgetful", 3)
    forgetful = run(other, tmp_path / "forgetful", 5, resume=str(tmp_path / "forgetful" / "iter_3.pth"))
    name = "pts_bbox_head.reference_points.weight"
    assert not torch.equal(weights(forgetful)[name], weights(whole)[name])


@pytest.mark.slow
def test_a_validation_at_the_checkpoint_changes_nothing_for_a_resumed_training(mini_config, tmp_path) -> None:
    mini_config.model.pts_bbox_head.decoder.update(dropout=0.1)
    full = Config.fromfile(CONFIGS / "streampetr_mini.py")
    for key in ("val_dataloader", "val_evaluator", "val_cfg"):
        mini_config[key] = full[key]
    mini_config.train_cfg.val_interval = 3
    whole = run(mini_config, tmp_path / "whole", 5)
    run(mini_config, tmp_path / "parts", 3)
    resumed = run(mini_config, tmp_path / "parts", 5, resume=str(tmp_path / "parts" / "iter_3.pth"))
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["processes", "batch_size"])
def test_with_other_streams_a_training_goes_on_without_their_memory(mini_config, tmp_path, change) -> None:
    run(mini_config, tmp_path / "parts", 3)
    saved = torch.load(tmp_path / "parts" / "iter_3.pth", weights_only=True)
    if change == "processes":
        saved[STATE_KEY]["ranks"] *= 2
    else:
        mini_config.train_dataloader.batch_size = 1
    torch.save(saved, tmp_path / "other.pth")
    seen = []

    class Spy(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
            seen.append(runner.model.memory)

    HOOKS.register_module(name="Spy", module=Spy, force=True)
    mini_config.custom_hooks.append(dict(type="Spy"))
    resumed = run(mini_config, tmp_path / "other", 5, resume=str(tmp_path / "other.pth"))
    assert resumed.iter == 5 and len(seen) == 2
    assert seen[0] is None and seen[1] is not None


def test_training_logs_every_loss_and_changes_every_parameter(mini_config) -> None:
    mini_config.optim_wrapper.optimizer.weight_decay = 0.0
    runner = Runner.from_cfg(mini_config)
    before = weights(runner)
    runner.train()
    after = weights(runner)
    frozen = {name for name, parameter in runner.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pts_bbox_head.pseudo_reference_points.weight"}
    for name, _ in runner.model.named_parameters():
        assert torch.equal(before[name], after[name]) == (name in frozen), name
    logged = set(runner.message_hub.log_scalars)
    for key in ("loss_cls", "d0.loss_bbox", "dn_loss_cls", "enc_loss_iou", "guidance_loss", "guidance_mass"):
        assert f"train/{key}" in logged
    assert all(math.isfinite(runner.message_hub.get_scalar(f"train/{k}").current()) for k in ("loss", "grad_norm"))


def test_guidance_ends_after_its_iterations(mini_config) -> None:
    mini_config.train_cfg.max_iters = 2
    for hook in mini_config.custom_hooks:
        if hook["type"] == "GuidanceHook":
            hook["iterations"] = 1
    runner = Runner.from_cfg(mini_config)
    runner.train()
    assert len(runner.message_hub.get_scalar("train/guidance_loss").data[0]) == 1


def test_random_state_survives_a_checkpoint(tmp_path) -> None:
    import random

    torch.save(random_state(), tmp_path / "state.pth")
    expected = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002
    set_random_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected  # noqa: NPY002


def learning_rates(name: str, at: list[int]) -> dict[str, list[float]]:
    """Rates of a published schedule at some iterations, per group."""
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import PARAM_SCHEDULERS

    config = Config.fromfile(CONFIGS / "streampetr" / f"{name}.py")
    model = torch.nn.ModuleDict({"img_backbone": torch.nn.Linear(1, 1), "head": torch.nn.Linear(1, 1)})
    wrapper = dict(config.optim_wrapper, type="OptimWrapper")
    wrapper = {key: value for key, value in wrapper.items() if key not in ("dtype", "loss_scale")}
    optim = build_optim_wrapper(model, wrapper)
    schedulers = [PARAM_SCHEDULERS.build(dict(s, optimizer=optim)) for s in config.param_scheduler]
    rates: dict[str, list[float]] = {"img_backbone": [], "head": []}
    for iteration in range(max(at) + 1):
        if iteration in at:
            groups = optim.optimizer.param_groups
            rates["img_backbone"].append(groups[0]["lr"])
            rates["head"].append(groups[-1]["lr"])
        for scheduler in schedulers:
            scheduler.step()
    return rates


@pytest.mark.parametrize(("name", "ratio", "epochs"), [
    ("streampetr_r50_704x256_428q_24e", 0.1, 24), ("streampetr_r50_704x256_900q_24e", 0.25, 24)])  # fmt: skip
def test_published_schedule(name, ratio, epochs) -> None:
    total = epochs * 1758
    at = [0, 250, 500, total // 2, total - 1]
    found = learning_rates(name, at)
    for i, iteration in enumerate(at):
        cosine = 1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * iteration / total))
        warmup = min(1.0, 1 / 3 + 2 / 3 * iteration / 500)
        assert found["head"][i] == pytest.approx(4e-4 * cosine * warmup, rel=5e-3)
        assert found["img_backbone"][i] == pytest.approx(ratio * found["head"][i], rel=1e-6)


def test_every_published_config_builds_its_pipeline_and_has_its_length() -> None:
    from mmdet3d.registry import TRANSFORMS
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet3d")
    paths = sorted((CONFIGS / "streampetr").glob("*e.py"))
    assert len(paths) >= 5
    for path in paths:
        config = Config.fromfile(path)
        dataset = config.train_dataloader.dataset
        for step in dataset.get("dataset", dataset).pipeline:
            TRANSFORMS.build(step)
        epochs = int(path.stem.rsplit("_", 1)[1][:-1])
        assert config.train_cfg.max_iters == epochs * (28130 // (8 if "8key" in path.stem else 16))
        assert config.param_scheduler[1].T_max == config.train_cfg.max_iters


def test_a_pruned_model_trains_and_refuses_a_dense_checkpoint(mini_config, tmp_path) -> None:
    from mmdet3d.registry import MODELS

    from mdp_mmdet3d.adapters import InputShape, trace_space
    from mdp_mmdet3d.space.builder import SpaceOptions
    from mdp_mmdet3d.surgery.plan import PruningPlan

    torch.manual_seed(0)
    dense = MODELS.build(mini_config.model)
    space = trace_space(dense, InputShape(6, 64, 176), SpaceOptions(4, 8, 8, 0.0, ()))
    kept = {d.name: (tuple(range(d.options[len(d.options) // 2])),) * d.copies for d in space.dimensions}
    removed = {space.blocks[0].name}
    PruningPlan.from_kept(space, kept, removed).save(tmp_path / "plan.json")
    torch.save({"state_dict": dense.state_dict(), "meta": {}}, tmp_path / "dense.pth")
    mini_config.model = dict(type="MDPPrunedModel", architecture=mini_config.model, plan=str(tmp_path / "plan.json"))
    mini_config.custom_hooks.append(dict(type="PlanHook"))
    mini_config.train_cfg.max_iters = 2
    mini_config.default_hooks.checkpoint.interval = 2
    runner = run(mini_config, tmp_path / "pruned", 2)
    assert sum(p.numel() for p in runner.model.parameters()) < sum(p.numel() for p in dense.parameters())
    saved = torch.load(tmp_path / "pruned" / "iter_2.pth", weights_only=True)
    assert saved["meta"]["mdp_plan"]["hash"] == PruningPlan.load(tmp_path / "plan.json").hash
    with pytest.raises(StructureMismatchError, match="does not fit this pruned model"):
        runner.load_checkpoint(str(tmp_path / "dense.pth"))
