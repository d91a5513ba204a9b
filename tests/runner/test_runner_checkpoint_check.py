"""What a training may start from or go on with; messages say what a checkpoint holds, not what it should hold."""

from __future__ import annotations

import logging

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import CosineAnnealingLR, LinearLR
from torch import nn

from mdp_mmdet3d.checkpoint.check import (
    after_schedule,
    check_resume,
    check_schedule,
    check_start,
    described,
    meta_of,
    plan_hash_of,
)
from mdp_mmdet3d.errors import FileFormatError, StructureMismatchError
from mdp_mmdet3d.runner.plan_hook import add_plan_hook

PLAN = {"mdp_plan": {"hash": "abc"}}


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def checkpoint(model: nn.Module, **meta) -> dict:
    return {"state_dict": model.state_dict(), "meta": {"epoch": 0, "iter": 3, **meta}, "optimizer": {}}


def test_its_own_checkpoint_is_accepted(model) -> None:
    check_start(checkpoint(model), model, "x.pth")
    check_resume(checkpoint(model), model, "x.pth")
    wrapped = {**checkpoint(model), "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}
    check_resume(wrapped, model, "x.pth")
    check_start({"state_dict": {"0.weight": torch.zeros(3, 2), "other": torch.zeros(1)}}, model, "a backbone")
    check_start(model.state_dict(), model, "a bare state dict")


def test_a_pruned_checkpoint_is_refused_by_a_dense_model(model) -> None:
    with pytest.raises(StructureMismatchError, match=r"x\.pth is of a pruned model \(plan abc\).*pruned_config\.py"):
        check_start(checkpoint(model, **PLAN), model, "x.pth")
    with pytest.raises(StructureMismatchError, match=r"training of a pruned model \(plan abc\).*another --work-dir"):
        check_resume(checkpoint(model, **PLAN), model, "x.pth")
    model.mdp_plan = "its own; compared elsewhere"
    check_resume(checkpoint(model, **PLAN), model, "x.pth")


def test_a_checkpoint_of_another_model_is_refused_on_resuming_and_a_new_buffer_is_not(model) -> None:
    other = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    with pytest.raises(StructureMismatchError) as error:
        check_resume(checkpoint(other), model, "x.pth")
    assert "0.weight: expected (3, 2), found (4, 2)" in str(error.value)
    assert "2.bias: expected nothing, found (4,)" in str(error.value)
    saved = checkpoint(model)
    del saved["state_dict"]["1.num_batches_tracked"]
    check_resume(saved, model, "x.pth")
    del saved["state_dict"]["0.bias"]
    with pytest.raises(StructureMismatchError, match=r"0\.bias: expected \(3,\), found nothing"):
        check_resume(saved, model, "x.pth")


def test_messages_say_what_is_there(model) -> None:
    foreign = {"model": model.state_dict(), "epoch": 3}
    with pytest.raises(FileFormatError, match=r"no weight of this model; it holds model \(7 tensors\), epoch \(int\)"):
        check_start(foreign, model, "x.pth")
    weights = {"state_dict": model.state_dict(), "meta": {}}
    with pytest.raises(FileFormatError, match=r"no meta\.epoch, no meta\.iter, no optimizer; it holds state_dict"):
        check_resume(weights, model, "x.pth")
    assert described({}) == "nothing"
    assert described({i: [0] * i for i in range(7)}).endswith("4 (list of 4), 2 more")


@pytest.mark.parametrize("meta", ["by me", 3, ["a"]])
def test_a_meta_that_is_no_dictionary_is_not_used_and_said(meta, model, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        assert meta_of({"meta": meta}, "x.pth") == {}
    assert f"x.pth: its meta is a {type(meta).__name__}" in caplog.text
    check_start({**checkpoint(model), "meta": meta}, model, "x.pth")
    with pytest.raises(FileFormatError, match=rf"no meta\.epoch.*meta \({type(meta).__name__}"):
        check_resume({**checkpoint(model), "meta": meta}, model, "x.pth")
    assert meta_of({}, "x.pth") == meta_of({"meta": None}, "x.pth") == {}


@pytest.mark.parametrize(("plan", "found"), [("abc", "str 'abc'"), ({"cuts": 1}, r"cuts \(int\)"), ({}, "nothing")])
def test_a_plan_in_the_meta_that_is_none_is_named(plan, found) -> None:
    with pytest.raises(FileFormatError, match=rf"x\.pth: its meta\.mdp_plan is no pruning plan, it holds {found}"):
        plan_hash_of({"mdp_plan": plan}, "x.pth")


def test_a_training_gets_the_hook_once() -> None:
    config = Config(dict(custom_hooks=[dict(type="A")]))
    add_plan_hook(config)
    add_plan_hook(config)
    assert config.custom_hooks == [dict(type="A"), dict(type="PlanHook")]
    config = Config(dict(custom_hooks=None))
    add_plan_hook(config)
    assert config.custom_hooks == [dict(type="PlanHook")]


def schedule(steps: int, kind=CosineAnnealingLR):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    return [kind(optimizer, T_max=steps, by_epoch=False, end=steps)]


def test_a_training_is_not_resumed_by_another_schedule_than_its_config_states() -> None:
    saved = schedule(100)
    for scheduler in saved:
        scheduler.step()
    content = {"param_schedulers": [scheduler.state_dict() for scheduler in saved]}
    check_schedule(content, schedule(100), "x.pth")
    with pytest.raises(StructureMismatchError, match=r"(?s)another schedule.*T_max: 100 in the checkpoint, 200 in the"):
        check_schedule(content, schedule(200), "x.pth")
    with pytest.raises(StructureMismatchError, match="1 schedulers in the checkpoint, 0 in the config"):
        check_schedule(content, [], "x.pth")


def test_a_training_that_is_longer_than_its_schedule_is_told_so() -> None:
    longer = {True: 1, False: 120}
    assert "ends at iteration 100 of 120" in after_schedule(schedule(100), longer)
    assert "ends at iteration 100 of 120" in after_schedule({"a": schedule(50), "b": schedule(100)}, longer)
    assert after_schedule(schedule(50) + schedule(120), longer) is None
    warm_up = LinearLR(schedule(50)[0].optimizer, start_factor=0.1, by_epoch=False, end=20)
    assert after_schedule([warm_up], longer) is None
    assert "100 of 120" in after_schedule([warm_up, *schedule(100)], longer)
    assert after_schedule([], longer) is None and after_schedule(None, longer) is None
