"""The loss of pruned models: batch norms re-estimated, paired with the dense model, kept in a file."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.importance.batch_norm import batch_norms, reestimate_batch_norm
from mdp_mmdet3d.importance.loss_changes import measure_loss_changes, measured_counts, single_cuts, split_reliability
from mdp_mmdet3d.importance.loss_probe import LossProbe, stream_pieces
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.plan import PruningPlan

from .loss_nets import Net, batches, losses, net_space, trained


@pytest.fixture(scope="module")
def net():
    return trained()


@pytest.fixture
def space(net):
    return net_space(net)


@pytest.fixture
def order(space):
    rng = np.random.default_rng(0)
    return {d.name: rng.permuted(np.tile(np.arange(d.size), (d.copies, 1)), axis=1) for d in space.dimensions}


def make_probe(net, path, data=None, frames=8, loss=losses, **options):
    data = batches(frames) if data is None else data
    options = {"round_frames": frames, "max_frames": frames, **options}
    return LossProbe(net, data, loss, path, {"weights": "w", "data": "d"}, **options)


def test_statistics_are_those_of_all_positions_of_all_batches():
    net = Net().eval()
    data = batches(5)
    before = {name: norm.weight.clone() for name, norm in batch_norms(net).items()}
    with torch.no_grad():
        inputs = torch.cat([net.stem(batch["x"]) for batch in data]).double().transpose(0, 1).flatten(1)
    reestimate_batch_norm(net, data, lambda batch: net(batch["x"]))
    torch.testing.assert_close(net.norm.running_mean.double(), inputs.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.norm.running_var.double(), inputs.var(1), rtol=1e-5, atol=1e-6)
    for name, norm in batch_norms(net).items():
        assert not norm.training and norm.momentum == 0.1 and torch.equal(norm.weight, before[name])
        assert int(norm.num_batches_tracked) == 0 and not norm._forward_hooks and not norm._forward_pre_hooks


def test_a_pass_may_end_behind_the_last_batch_norm():
    whole, early = Net().eval(), Net().eval()
    reestimate_batch_norm(whole, batches(3), lambda batch: whole(batch["x"]))
    ran = []
    early.head.register_forward_hook(lambda *_: ran.append(1))
    reestimate_batch_norm(early, batches(3), lambda batch: early(batch["x"]), calls=5)
    assert not ran
    for name, norm in batch_norms(whole).items():
        other = batch_norms(early)[name]
        assert torch.equal(norm.running_mean, other.running_mean) and torch.equal(norm.running_var, other.running_var)


def test_one_value_per_channel_and_norms_that_do_not_run():
    net = nn.Sequential(nn.BatchNorm1d(3)).eval()
    idle = nn.BatchNorm2d(2)
    net.add_module("idle", idle)
    reestimate_batch_norm(net, [torch.full((1, 3), 2.0), torch.full((1, 3), 4.0)], net[0])
    assert net[0].running_mean.tolist() == [3.0] * 3 and net[0].running_var.tolist() == [2.0] * 3
    assert idle.running_mean.tolist() == [0.0, 0.0]


def test_synchronised_batch_norms_get_the_same_statistics():
    plain, synchronised = Net().eval(), nn.SyncBatchNorm.convert_sync_batchnorm(Net().eval())
    reestimate_batch_norm(plain, batches(3), lambda batch: plain(batch["x"]))
    reestimate_batch_norm(synchronised, batches(3), lambda batch: synchronised(batch["x"]))
    assert {type(norm) for norm in batch_norms(synchronised).values()} == {nn.SyncBatchNorm}
    for name, norm in batch_norms(plain).items():
        other = batch_norms(synchronised)[name]
        torch.testing.assert_close(norm.running_var, other.running_var)
        assert norm.running_var.ne(1).all() and int(other.num_batches_tracked) == 0


def direct(net, plan, data):
    """Loss per batch of a pruned model with batch norms re-estimated, without the probe."""
    model = apply_plan(copy.deepcopy(net), plan)
    reestimate_batch_norm(model, data, lambda batch: model(batch["x"]))
    with torch.no_grad():
        return np.array([float(losses(model, batch)) for batch in data])


def test_changes_are_those_of_a_direct_computation(net, space, order, tmp_path):
    probe = make_probe(net, tmp_path / "losses.npz")
    data = batches(8)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    dense = direct(net, PruningPlan.from_kept(space, {}, set()), data)
    assert probe.dense_loss == pytest.approx(dense.mean(), rel=1e-6)
    cuts = single_cuts(space, order, 3)
    assert len(cuts) == 5 + 4 * 3
    for plan in cuts.values():
        np.testing.assert_allclose(probe.change(plan), direct(net, plan, data) - dense, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    both = PruningPlan.from_kept(space, {}, {"blocks.0", "layer.1"})
    assert probe.change(both).mean() == pytest.approx((direct(net, both, data) - dense).mean(), rel=1e-4)


def test_models_may_be_repaired_before_they_are_measured(net, space, order, tmp_path):
    cuts = single_cuts(space, order, 1)
    seen = []

    def repair(model, plan):
        seen.append(plan.hash)
        with torch.no_grad():
            model.head.bias += 0.25 + 0.0 * torch.rand(())

    probe = make_probe(net, tmp_path / "losses.npz", repair=repair, frames=12, round_frames=4)
    probe.more_frames()
    plan = cuts["blocks.0", None]
    found = probe.change(plan)
    model = apply_plan(copy.deepcopy(net), plan)
    repair(model, plan)
    with torch.no_grad():
        expected = [float(losses(model, b)) - float(losses(net, b)) for b in batches(12)[:8]]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert seen == [plan.hash] * 2  # once by the probe, however many rounds of frames there are


class Counted:
    """Losses that are counted, and that fail after a while."""

    def __init__(self, limit=10**9):
        self.calls, self.limit = 0, limit

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls > self.limit:
            raise KeyboardInterrupt
        return losses(model, batch)


def test_an_interrupted_run_goes_on_and_ends_alike(net, space, order, tmp_path):
    whole = measure_loss_changes(make_probe(net, tmp_path / "a.npz"), space, order, widths=2, progress=False)
    path = tmp_path / "b.npz"
    with pytest.raises(KeyboardInterrupt):
        measure_loss_changes(make_probe(net, path, loss=Counted(150)), space, order, widths=2, progress=False)
    counted = Counted()
    resumed = measure_loss_changes(make_probe(net, path, loss=counted), space, order, widths=2, progress=False)
    assert resumed == whole
    again = Counted()
    assert measure_loss_changes(make_probe(net, path, loss=again), space, order, widths=2, progress=False) == whole
    setup = Counted()
    make_probe(net, tmp_path / "c.npz", loss=setup)
    assert setup.calls == again.calls < counted.calls < Counted().limit
    for leftover in tmp_path.iterdir():
        assert leftover.suffix == ".npz" and not leftover.name.startswith(".")


def test_other_data_at_the_same_place_is_noticed(net, space, order, tmp_path):
    path = tmp_path / "losses.npz"
    plan = single_cuts(space, order, 1)["blocks.0", None]
    make_probe(net, path).change(plan)
    assert make_probe(net, path).measured(plan)
    said = []
    other = make_probe(net, path, data=batches(8, seed=5), say=said.append)
    assert not other.measured(plan) and "measured again" in said[0]
    assert not make_probe(Net(3).eval(), path).measured(plan)


def test_random_numbers_of_the_loss_are_the_same_for_every_model(net, space, tmp_path):
    def noisy(model, batch):
        noise = torch.randn(batch["x"].shape) + np.random.normal() + random.random()  # noqa: NPY002
        return losses(model, {**batch, "x": batch["x"] + noise})

    nothing = PruningPlan.from_kept(space, {}, set())
    probe = make_probe(net, tmp_path / "losses.npz", loss=noisy)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    assert not probe.change(nothing).any()
    assert torch.equal(torch.rand(1), expected)  # nobody else's random numbers were taken


def test_augmentation_is_the_same_again_whatever_ran_in_between(net, space, order, tmp_path):
    def augmented():
        for batch in batches(40):
            yield {**batch, "x": batch["x"] + float(np.random.normal())}  # noqa: NPY002

    path = tmp_path / "losses.npz"
    options = dict(round_frames=8, max_frames=16)
    probe = make_probe(net, path, data=augmented(), **options)
    first = probe.change(single_cuts(space, order, 1)["blocks.0", None])
    np.random.normal(size=7)  # noqa: NPY002
    assert probe.more_frames()
    probe.change(single_cuts(space, order, 1)["blocks.0", None])
    said = []
    again = make_probe(net, path, data=augmented(), say=said.append, **options)
    assert again.more_frames() and not said
    assert again.measured(single_cuts(space, order, 1)["blocks.0", None])
    np.testing.assert_array_equal(again.change(single_cuts(space, order, 1)["blocks.0", None])[:8], first)


def test_bad_input_is_refused(net, space, order, tmp_path):
    with pytest.raises(MdpError, match="at least 4 frames with ground truth, there are none"):
        make_probe(net, tmp_path / "a.npz", data=[])
    with pytest.raises(MdpError, match="has 3; give it more"):
        make_probe(net, tmp_path / "a.npz", data=batches(3))
    data = batches(8)
    data[5]["y"][0] = float("nan")
    with pytest.raises(MdpError, match="dense model is nan on frame 5"):
        make_probe(net, tmp_path / "a.npz", data=data)

    def fragile(model, batch):
        return losses(model, batch) * (
            1.0 if isinstance(model.blocks[1], nn.Module) and hasattr(model.blocks[1], "conv1") else float("inf")
        )

    probe = make_probe(net, tmp_path / "b.npz", loss=fragile)
    with pytest.raises(MdpError, match=r"without blocks\.1 the loss is inf on frame 0.*prune\.freeze"):
        measure_loss_changes(probe, space, order, widths=1, progress=False)
    cuts = single_cuts(space, order, 1)
    probe = make_probe(net, tmp_path / "b.npz", loss=fragile)
    assert probe.measured(cuts["blocks.0", None]) and not probe.measured(cuts["blocks.1", None])


def test_frames_are_added_while_the_ranking_is_not_stable(net, space, order, tmp_path):
    noise = np.random.default_rng(0)

    def unstable(model, batch):
        return losses(model, batch) + torch.tensor(noise.normal())

    said = []
    options = dict(round_frames=8, max_frames=24)
    probe = make_probe(net, tmp_path / "a.npz", data=batches(40), loss=unstable, **options)
    found = measure_loss_changes(probe, space, order, widths=1, progress=False, say=said.append)
    assert found.frames == 24 and found.reliability < 0.97
    assert sum("not stable yet" in line for line in said) == 2 and "no more frames" in said[-1]
    calm = make_probe(net, tmp_path / "b.npz", data=batches(40), **options)
    steady = measure_loss_changes(calm, space, order, widths=1, progress=False)
    assert steady.frames < 24 and steady.reliability >= 0.97
    assert all(0 < change.error < 0.1 for change in steady.blocks.values())


def test_reliability():
    rng = np.random.default_rng(0)
    pieces = np.repeat(np.arange(4), 8)
    truth = rng.normal(size=(50, 1))
    assert split_reliability(truth + 0.01 * rng.normal(size=(50, 32)), pieces) > 0.99
    assert split_reliability(rng.normal(size=(50, 32)), pieces) < 0.6
    assert split_reliability(np.zeros((5, 4)), np.arange(4)) == 1.0


def test_pieces_of_streams():
    class Sample:
        def __init__(self, goes_on):
            self.metainfo = {"prev_exists": goes_on}

    def stream(length):
        return [{"data_samples": [Sample(i > 0)], "i": i} for i in range(length)]

    found = list(stream_pieces([*stream(12)[3:], *stream(12), *stream(2), *stream(1)], 8))
    assert [[batch["i"] for batch in piece] for piece in found] == [list(range(8)), [0, 1], [0]]
    assert len(list(stream_pieces(batches(5)))) == 5


def test_counts_to_measure():
    assert measured_counts((8, 16), 4) == (8,)
    assert measured_counts((4, 8, 12, 16), 4) == (4, 8, 12)
    assert measured_counts(tuple(range(16, 129, 16)), 4) == (16, 48, 80, 96)
    assert measured_counts(tuple(range(16, 129, 16)), 2) == (16, 80)
    assert measured_counts(tuple(range(16, 129, 16)), 1) == (16,)
