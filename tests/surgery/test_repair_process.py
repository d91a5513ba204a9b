"""Repair as a process: deterministic, resumable, never worse, alike for any number of processes; its errors."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mdp_mmdet3d.errors import MdpError, StructureMismatchError
from mdp_mmdet3d.surgery.repair import RepairReport, RepairSettings, RepairStore, WeightedFrame, repair
from mdp_mmdet3d.surgery.repair.replay import Replay

from .repair_nets import axes, cut, error, frames_of, plan_of, setting, state_of, weighted

WORKER = Path(__file__).with_name("repair_worker.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}


def test_it_is_deterministic_and_leaves_the_dense_model_alone():
    model, plan, frames, x = setting()
    dense = state_of(model)
    first, second = cut(model, plan), cut(model, plan)
    raw = error(model, first, x)
    reports = [repair(model, pruned, plan, frames, RepairSettings(positions=300)) for pruned in (first, second)]
    assert reports[0] == reports[1]
    torch.testing.assert_close(state_of(first), state_of(second), rtol=0, atol=0)
    torch.testing.assert_close(state_of(model), dense, rtol=0, atol=0)
    assert error(model, first, x) < 0.7 * raw
    other = cut(model, plan)
    repair(model, other, plan, frames, RepairSettings(positions=300, seed=1))
    assert any(not torch.equal(a, b) for a, b in zip(state_of(first).values(), state_of(other).values()))


def test_modules_are_as_they_were_afterwards():
    model, plan, frames, _ = setting()
    pruned = cut(model, plan).train()
    pruned[1].eval()
    repair(model, pruned, plan, frames)
    assert pruned.training and not pruned[1].training
    assert not any("forward" in vars(module) for net in (model, pruned) for module in net.modules())
    assert all(p.requires_grad and p.grad_fn is None for p in pruned.parameters())


@pytest.mark.parametrize("memory_gb", [3.0, 2e-5, 1e-9])
def test_recorded_outputs_change_nothing_but_the_time(memory_gb):
    """With room for all, for some and for no outputs."""
    model, plan, frames, _ = setting()
    expected, found = cut(model, plan), cut(model, plan)
    repair(model, expected, plan, frames)
    repair(model, found, plan, frames, RepairSettings(memory_gb=memory_gb))
    torch.testing.assert_close(state_of(found), state_of(expected), rtol=1e-6, atol=1e-7)


def test_outputs_that_nothing_reads_any_more_are_dropped():
    model, _, frames, _ = setting()
    model[2].inplace = False  # an operator in place has to be repeated, and so reads what was before it
    names = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    with Replay(model, {0: frames[0]}, names, 10**9) as replay:
        replay.trace(0, lambda observed: None)
        for name in names[:-1]:
            replay.settle(name)
            replay.run(0, {names[-1]}, lambda observed: None, 1)
        seen = []
        replay.run(0, {names[-1]}, lambda observed: seen.append(observed.inputs.clone()), 1)
        full = [stored for stored in replay._cache[0].values() if not stored.emptied]
        assert len(full) == 1 and full[0].size == seen[0].numel() * 4  # what the last layer takes, and nothing else
        with torch.no_grad():
            torch.testing.assert_close(seen[0], nn.Sequential.forward(model[:-1], _input(frames[0])))


def _input(frame):
    taken = []
    frame(lambda x: taken.append(x))
    return taken[0].clone()


def test_a_killed_repair_goes_on_behind_the_last_finished_layer(tmp_path, monkeypatch):
    model, plan, frames, _ = setting()
    identity = {"plan": plan.hash}
    whole = cut(model, plan)
    report = repair(model, whole, plan, frames)

    class Killed(BaseException):
        pass

    def kill(done: int, total: int) -> None:
        if done == 4:
            raise Killed

    pruned = cut(model, plan)
    raw = state_of(pruned)
    with pytest.raises(Killed):
        repair(model, pruned, plan, frames, store=RepairStore(tmp_path / "r", identity), on_layer=kill)
    torch.testing.assert_close(state_of(pruned), raw, rtol=0, atol=0)  # nothing half-written
    assert len(list((tmp_path / "r").glob("*.npz"))) == 4 and not (tmp_path / "r/finished.json").exists()

    import mdp_mmdet3d.surgery.repair.refit as module

    fitted = []
    original = module.fit_layer
    monkeypatch.setattr(module, "fit_layer", lambda layer, *a: fitted.append(layer.name) or original(layer, *a))
    resumed = repair(model, pruned, plan, frames, store=RepairStore(tmp_path / "r", identity))
    assert len(fitted) == len(report.layers) - 4
    assert resumed == report
    torch.testing.assert_close(state_of(pruned), state_of(whole), rtol=0, atol=0)

    # Finished, it is read, and only for what it was made for.
    again = cut(model, plan)
    assert RepairStore(tmp_path / "r", identity).apply(again) == report
    torch.testing.assert_close(state_of(again), state_of(whole), rtol=0, atol=0)
    damaged = next((tmp_path / "r").glob("*.npz"))
    damaged.write_bytes(damaged.read_bytes()[:40])
    again = cut(model, plan)
    store = RepairStore(tmp_path / "r", identity)
    if store.apply(again) is None:
        torch.testing.assert_close(state_of(again), raw, rtol=0, atol=0)
    other = RepairStore(tmp_path / "r", {"plan": "another"})
    assert other.apply(again) is None and not (tmp_path / "r").exists()


def test_a_layer_that_would_get_worse_on_held_out_frames_stays_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 3)).eval()
    plan = plan_of(model, {"0.out": (range(40), 60, axes(("0.weight", 0), ("0.bias", 0), ("2.weight", 1)))})
    pruned = cut(model, plan)
    raw = state_of(pruned)
    # Fitted frames whose inputs hardly differ teach nothing about the held-out ones.
    usual = torch.randn(1, 40)
    inputs = [usual + 1e-3 * torch.randn(4, 40) if i % 4 != 3 else 5 * torch.randn(64, 40) for i in range(8)]
    report = repair(model, pruned, plan, frames_of(inputs), RepairSettings(ridge=1e-9))
    assert report.layers[1].left == "no better on held-out frames"
    assert report.layers[1].held_out[1] >= report.layers[1].held_out[0]
    torch.testing.assert_close(state_of(pruned), raw, rtol=0, atol=0)


def test_predictions_that_count_more_are_fitted_better():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    members = axes(("0.weight", 0), ("0.bias", 0), ("2.weight", 1))
    plan = plan_of(model, {"0.out": (range(4), 12, members)})
    # Two kinds of rows, which so few units cannot both do right.
    kinds = torch.tensor([1.0, 0.0]).repeat(100)
    inputs = [torch.randn(200, 8) * torch.where(kinds > 0, 1.0, 3.0)[:, None] + 2 * kinds[:, None] for _ in range(5)]
    frames, first, rest = frames_of(inputs[:4]), inputs[4][kinds > 0], inputs[4][kinds == 0]
    found = []
    for each in (frames, [WeightedFrame(frame, kinds + 0.01) for frame in frames]):
        pruned = cut(model, plan)
        report = repair(model, pruned, plan, each)
        assert report.layers[1].samples == 600
        found.append((error(model, pruned, first), error(model, pruned, rest)))
    (alike_first, alike_rest), (first_error, rest_error) = found
    assert first_error < 0.8 * alike_first and rest_error > alike_rest


def test_weights_that_are_all_equal_change_nothing():
    model, plan, frames, _ = setting()
    alike, same = cut(model, plan), cut(model, plan)
    repair(model, alike, plan, frames)
    repair(model, same, plan, [WeightedFrame(frame, torch.full((2, 10, 10), 0.25)) for frame in frames])
    torch.testing.assert_close(state_of(same), state_of(alike), rtol=1e-4, atol=1e-5)


def test_fewer_positions_than_unknowns_are_said_and_do_no_harm():
    model, plan, frames, x = setting()
    pruned = cut(model, plan)
    raw = error(model, pruned, x)
    report = repair(model, pruned, plan, frames, RepairSettings(positions=48))
    layer = next(layer for layer in report.layers if layer.name == "3")
    assert layer.samples == 36 < layer.unknowns == 72
    assert error(model, pruned, x) < raw


def test_one_batch_is_enough_since_samples_are_held_out():
    model, plan, frames, x = setting()
    pruned = cut(model, plan)
    raw = error(model, pruned, x)
    report = repair(model, pruned, plan, frames[:1])
    assert error(model, pruned, x) < raw and all(layer.held_out is not None for layer in report.refitted)


def test_no_frames_are_an_error():
    model, plan, _, _ = setting()
    with pytest.raises(MdpError, match=r"needs calibration frames and there are none.*prune\.repair=False"):
        repair(model, cut(model, plan), plan, [])


@pytest.mark.parametrize("side", ["dense", "pruned"])
def test_values_that_are_not_finite_name_the_layer_and_change_nothing(side):
    model, plan, frames, _ = setting()
    pruned = cut(model, plan)
    broken = model if side == "dense" else pruned
    broken[4][1].conv.weight.data[0, 0, 0, 0] = float("nan")
    raw = state_of(pruned)
    message = r"4\.1\.conv.* not finite in calibration batch 0.*prune\.repair=False"
    with pytest.raises(MdpError, match=message):
        repair(model, pruned, plan, frames)
    torch.testing.assert_close(state_of(pruned), raw, rtol=0, atol=0, equal_nan=True)


def test_a_layer_that_never_runs_is_left_and_named():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.table = nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(3, 4)

        def forward(self, x):
            return self.used(x)

    model = Idle().eval()
    pruned = cut(model, plan_of(model, {}))
    pruned.used.weight.data *= 0.5
    inputs = [torch.randn(16, 4) for _ in range(4)]
    report = repair(model, pruned, plan_of(model, {}), frames_of(inputs))
    left = {layer.name: layer.left for layer in report.layers}
    assert left == {
        "used": "",
        "table": "parameters of a Embedding are not refitted",
        "idle": "no calibration frame runs it",
    }


def test_weights_that_two_layers_share_and_layers_that_lie_are_left():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight / (1 + self.weight.abs().sum()), self.bias)

    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), Standardised(3, 3, 3)).eval()
    model[1].weight = model[0].weight
    plan = plan_of(model, {})
    pruned = cut(model, plan)
    pruned[2].weight.data *= 0.5
    raw = state_of(pruned)
    report = repair(model, pruned, plan, frames_of([torch.randn(2, 3, 8, 8) for _ in range(4)]))
    left = {layer.name: layer.left for layer in report.layers}
    assert left["0"] == "it shares its weights with 1" and left["1"] == "it shares its weights with 0"
    assert "not the linear map" in left["2"]
    torch.testing.assert_close(state_of(pruned), raw, rtol=0, atol=0)


def test_weights_in_half_precision_stay_in_half_precision():
    model, plan, frames, x = setting()
    pruned = cut(model, plan).to(torch.bfloat16)
    raw = state_of(pruned)

    def in_half(frame):
        return lambda net: frame(net if net is model else lambda x: net(x.to(torch.bfloat16)))

    repair(model, pruned, plan, [in_half(frame) for frame in frames])
    state = state_of(pruned)
    assert {t.dtype for t in state.values()} == {t.dtype for t in raw.values()}
    with torch.no_grad():
        dense, ours = model(x), pruned(x.to(torch.bfloat16)).float()
        sliced = cut(model, plan)(x)
    assert (ours - dense).norm() < 0.8 * (sliced - dense).norm()


def test_plans_of_another_model_and_models_of_another_plan_are_refused():
    model, plan, frames, _ = setting()
    pruned = cut(model, plan)
    with pytest.raises(StructureMismatchError, match="another model"):
        repair(nn.Sequential(nn.Linear(3, 3)), pruned, plan, frames)
    with pytest.raises(MdpError, match=r"0\.weight of the pruned model has shape .*12.*cut the model with this plan"):
        repair(model, copy.deepcopy(model), plan, frames)


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_end_with_the_weights_of_one(tmp_path, world):
    model, plan, frames, _ = setting()
    alone = cut(model, plan)
    report = repair(model, alone, plan, weighted(frames), RepairSettings(positions=500))
    workers = [
        subprocess.Popen([sys.executable, str(WORKER), str(rank), str(world), str(tmp_path)], env=ENVIRONMENT)
        for rank in range(world)
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0] * world
    for rank in range(world):
        state, found = torch.load(tmp_path / f"{world}-{rank}.pth", weights_only=True)
        torch.testing.assert_close(state, state_of(alone), rtol=1e-5, atol=1e-5)
        assert [layer.left for layer in RepairReport.from_dict(found).layers] == [x.left for x in report.layers]
