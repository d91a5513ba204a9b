"""The importance hook in MMEngine's training: exactness, accumulation, resuming, what is left out."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

import mdp_mmdet3d.runner  # noqa: F401
import projects.streampetr  # noqa: F401
from mdp_mmdet3d.errors import StructureMismatchError
from mdp_mmdet3d.importance.collect import collect_importance
from mdp_mmdet3d.runner.importance_hook import space_of
from mdp_mmdet3d.runner.settings import PruneSettings

from .hook_trainings import PRUNE, assert_same, table_of, train


def test_hook_collects_what_a_plain_pass_collects_and_leaves_frozen_parameters_alone(make_config, tmp_path) -> None:
    # Learning rate 0 still decays nothing, so training must not differ from a pass over the data.
    runner = train(make_config(tmp_path / "w", [dict(type="ImportanceHook", num_steps=3)], 4))
    table = table_of(runner)
    model = runner.model
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(p.requires_grad or p.grad is not None for m in norms for p in m.parameters())
    space = space_of(model, runner.cfg, PruneSettings.from_config(PRUNE))
    frames = runner.train_dataloader.dataset
    batches = [
        dict(inputs=dict(img=[frames[i]["inputs"]["img"]]), data_samples=[frames[i]["data_samples"]]) for i in range(3)
    ]
    expected = collect_importance(
        model, space, batches, tmp_path / "plain.npz", num_batches=3, weights="x", progress=False
    )
    assert table.batches == 3 and table.weights == "training"
    assert_same(table, expected)


def test_an_optimizer_never_moves_the_frozen_norms_it_holds(make_config, tmp_path) -> None:
    runner = Runner.from_cfg(make_config(tmp_path / "w", [dict(type="ImportanceHook", num_steps=2)], 2, lr=1e-2))
    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    runner.train()
    after = runner.model.state_dict()
    assert not torch.equal(before["img_backbone.conv1.weight"], after["img_backbone.conv1.weight"])
    for name in before:
        if ".bn" in name or name.startswith("img_backbone.bn") or ".downsample.1" in name:
            assert torch.equal(before[name], after[name]), name


def test_gradient_accumulation_books_mean_gradients_once_per_step(make_config, tmp_path) -> None:
    hooks = [dict(type="ImportanceHook", num_steps=2)]
    accumulated = table_of(train(make_config(tmp_path / "a", hooks, 4, accumulative_counts=2)))
    single = table_of(train(make_config(tmp_path / "b", [dict(type="ImportanceHook", num_steps=4)], 4)))
    assert (accumulated.batches, single.batches) == (2, 4)
    larger = 0
    for name, blocks in single.scores.items():
        for block, array in blocks.items():
            # |mean| never exceeds the mean of the absolute values.
            assert (accumulated.scores[name][block] <= array * (1 + 1e-4) + 1e-9).all()
            larger += int((accumulated.scores[name][block] < 0.9 * array).sum())
    assert larger > 0


def test_steps_that_are_not_finite_are_skipped_and_counted(make_config, tmp_path) -> None:
    config = make_config(tmp_path / "w", [dict(type="ImportanceHook", num_steps=3)], 3)
    config.train_dataloader.dataset.corrupt = 1
    runner = train(config)
    table = table_of(runner)
    assert (table.batches, table.skipped) == (2, 1)
    assert runner.optim_wrapper.skipped_steps == 1
    assert all(p.isfinite().all() for p in runner.model.parameters())


def test_resuming_in_the_middle_gives_the_same_table(make_config, tmp_path) -> None:
    hooks = [dict(type="ImportanceHook", num_steps=4, begin=1)]
    whole = table_of(train(make_config(tmp_path / "whole", hooks, 5, lr=1e-4)))
    train(make_config(tmp_path / "parts", hooks, 2, lr=1e-4))
    assert not (tmp_path / "parts" / "importance.npz").exists()
    config = make_config(tmp_path / "parts", hooks, 5, lr=1e-4)
    config.resume, config.load_from = True, str(tmp_path / "parts" / "iter_2.pth")
    assert_same(table_of(train(config)), whole)


def test_loading_weights_is_no_resuming(make_config, tmp_path) -> None:
    hooks = [dict(type="ImportanceHook", num_steps=3)]
    train(make_config(tmp_path / "first", hooks, 2))
    config = make_config(tmp_path / "second", hooks, 3)
    config.load_from = str(tmp_path / "first" / "iter_2.pth")
    assert table_of(train(config)).batches == 3


def test_moving_average_and_importance_do_not_disturb_each_other(make_config, tmp_path) -> None:
    importance, average = dict(type="ImportanceHook", num_steps=3), dict(type="EMAHook", momentum=0.5)
    alone = train(make_config(tmp_path / "a", [importance], 4, lr=1e-3))
    both = train(make_config(tmp_path / "b", [average, importance], 4, lr=1e-3))
    assert_same(table_of(both), table_of(alone), rtol=0)
    averaged, live = (torch.load(tmp_path / name / "iter_4.pth", weights_only=True) for name in "ba")
    name = "img_backbone.conv1.weight"
    assert torch.equal(averaged["ema_state_dict"][f"module.{name}"], live["state_dict"][name])
    assert not torch.equal(averaged["state_dict"][name], live["state_dict"][name])


def test_the_number_of_steps_left_out_survives_resuming(make_config, tmp_path) -> None:
    def config(iterations: int) -> Config:
        made = make_config(tmp_path / "w", [], iterations)
        made.train_dataloader.dataset.corrupt = 1
        return made

    train(config(2))
    resumed = config(6)  # the frames come in turns of four
    resumed.resume, resumed.load_from = True, str(tmp_path / "w" / "iter_2.pth")
    assert train(resumed).optim_wrapper.skipped_steps == 2


def test_importance_of_another_model_is_refused(make_config, tmp_path) -> None:
    hooks = [dict(type="ImportanceHook", num_steps=9)]
    train(make_config(tmp_path / "w", hooks, 2))
    config = make_config(tmp_path / "w", hooks, 3)
    config.prune.max_options = 3
    config.resume, config.load_from = True, str(tmp_path / "w" / "iter_2.pth")
    with pytest.raises(StructureMismatchError, match="importance of another model or pruning space"):
        train(config)


def test_loss_scale_of_mixed_precision_is_taken_out(make_config, tmp_path, monkeypatch) -> None:
    from mmengine.optim import OptimWrapper

    hooks = [dict(type="ImportanceHook", num_steps=2)]
    plain = table_of(train(make_config(tmp_path / "a", hooks, 2)))

    class Scaler:
        """As torch's, but the scale grows with every step."""

        scale = 64.0

        def get_scale(self) -> float:
            return self.scale

    class ScaledOptimWrapper(OptimWrapper):
        def __init__(self, **kwargs) -> None:
            super().__init__(**kwargs)
            self.loss_scaler = Scaler()

        def backward(self, loss, **kwargs) -> None:
            super().backward(loss * self.loss_scaler.scale, **kwargs)

        def step(self, **kwargs) -> None:
            super().step(**kwargs)
            self.loss_scaler.scale *= 2

    from mmengine.registry import OPTIM_WRAPPERS

    OPTIM_WRAPPERS.register_module(name="ScaledOptimWrapper", module=ScaledOptimWrapper, force=True)
    config = make_config(tmp_path / "b", hooks, 2)
    config.optim_wrapper.type = "ScaledOptimWrapper"
    assert_same(table_of(train(config)), plain)
