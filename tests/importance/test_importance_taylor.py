"""Importance is the derivative with respect to a gate; collection resumes, skips what is not finite, restores."""

import numpy as np
import pytest
import torch
from torch import nn

from mdp_mmdet3d.adapters import InputShape, trace_space
from mdp_mmdet3d.errors import FileFormatError, StructureMismatchError
from mdp_mmdet3d.importance.collect import collect_importance
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.importance.taylor import TaylorAccumulator
from mdp_mmdet3d.space.attention import add_attention
from mdp_mmdet3d.space.builder import SpaceBuilder, SpaceOptions
from mdp_mmdet3d.space.conv import add_conv_dimensions
from mdp_mmdet3d.space.mlp import add_hidden


class ConvNet(nn.Module):
    def __init__(self, frozen):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 4, 3)
        self.gate = torch.ones(32, dtype=torch.float64, requires_grad=True)
        for parameter in self.bn1.parameters():
            nn.init.normal_(parameter)
            parameter.requires_grad_(not frozen)

    def forward(self, x):
        return self.conv2((self.bn1(self.conv1(x)) * self.gate.to(x.dtype)[:, None, None]).relu())


def priced(builder):
    """Give every dimension some cost: a space without is refused."""
    for name in builder.dimensions:
        builder.add_term(f"{name}.cost", "head", "ffn", (name,), tokens=1, embed_dims=1)
    return builder


@pytest.mark.parametrize("frozen", [False, True])
def test_channel_score_is_the_derivative_of_a_gate(frozen):
    torch.manual_seed(0)
    net = ConvNet(frozen).eval()
    builder = SpaceBuilder(net, SpaceOptions())
    add_conv_dimensions(builder, net)
    space = priced(builder).finish("ConvNet", "f")
    assert [d.name for d in space.dimensions] == ["conv1.out"]
    net.double()
    with TaylorAccumulator(net, space) as accumulator:
        net(torch.randn(2, 3, 16, 16, dtype=torch.float64)).square().sum().backward()
        assert accumulator.finish_batch()
        score = accumulator.table("random").total("conv1.out")[0]
    np.testing.assert_allclose(score, net.gate.grad.abs().numpy(), rtol=1e-9)
    assert all(p.requires_grad is not frozen for p in net.bn1.parameters())


class Attention(nn.Module):
    """Wraps the project's attention; ``pos`` gates each width of each head by scaling its rows."""

    def __init__(self):
        super().__init__()
        from projects.streampetr.attention import MultiheadAttention

        self.attn = MultiheadAttention(16, 2)


@pytest.mark.parametrize("kind,first_row", [("qk", 0), ("v", 32)])
def test_head_width_score_is_the_derivative_of_a_gate(kind, first_row):
    torch.manual_seed(1)
    net = Attention().double()
    nn.init.normal_(net.attn.in_proj_bias)
    builder = SpaceBuilder(net, SpaceOptions(head_width_multiple=2))
    add_attention(builder, "attn", net.attn.num_heads, net.attn.qk_head_dim, net.attn.v_head_dim)
    space = priced(builder).finish("Attention", "f")
    x, y = torch.randn(1, 3, 16, dtype=torch.float64), torch.randn(1, 5, 16, dtype=torch.float64)

    def loss():
        return net.attn(x, y, y).square().sum()

    with TaylorAccumulator(net, space) as accumulator:
        loss().backward()
        accumulator.finish_batch()
        score = accumulator.table("random").total(f"attn.{kind}")
    assert score.shape == (2, 8)
    step = 1e-6
    for head in range(2):
        for element in range(8):
            row = first_row + head * 8 + element
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    old = net.attn.in_proj_weight[row].clone(), net.attn.in_proj_bias[row].clone()
                    net.attn.in_proj_weight[row] *= 1 + sign * step
                    net.attn.in_proj_bias[row] *= 1 + sign * step
                    values.append(loss().item())
                    net.attn.in_proj_weight[row], net.attn.in_proj_bias[row] = old
            numeric = abs(values[0] - values[1]) / (2 * step)
            assert score[head, element] == pytest.approx(numeric, rel=1e-4, abs=1e-7)


def test_gradients_may_be_cleared_before_the_batch_is_booked():
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    builder = SpaceBuilder(net, SpaceOptions())
    add_hidden(builder, "0", ("2",), 32)
    space = priced(builder).finish("mlp", "f")
    x = torch.randn(8, 4)
    totals = []
    for clear in (False, True):
        net.zero_grad()
        with TaylorAccumulator(net, space) as accumulator:
            (net(x).square().sum() * 8).backward()
            if clear:
                net.zero_grad(set_to_none=True)
            accumulator.finish_batch(loss_scale=8.0 if clear else 1.0)
            totals.append(accumulator.table("random").total("0.out"))
    np.testing.assert_allclose(totals[0], totals[1] * 8, rtol=1e-6)
    assert totals[0].max() > 0


def test_batches_that_are_not_finite_are_skipped_and_counted():
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    builder = SpaceBuilder(net, SpaceOptions())
    add_hidden(builder, "0", ("2",), 32)
    with TaylorAccumulator(net, priced(builder).finish("mlp", "f")) as accumulator:
        for scale in (1.0, float("nan"), float("inf")):
            net.zero_grad()
            (net(torch.ones(1, 4)).sum() * scale).backward()
            accumulator.finish_batch()
        table = accumulator.table("random")
    assert (table.batches, table.skipped) == (1, 2)
    assert np.isfinite(table.total("0.out")).all()


@pytest.fixture
def space(tiny_model):
    return trace_space(tiny_model, InputShape(6, 64, 176))


class Killed(Exception):
    pass


def interrupted(batches, after):
    for i, batch in enumerate(batches):
        if i == after:
            raise Killed
        yield batch


def test_interrupted_collection_ends_at_the_same_table(tiny_model, space, tiny_frames, tmp_path):
    frames = tiny_frames(4)
    options = dict(num_batches=4, weights="random", data="frames", progress=False)
    whole = collect_importance(tiny_model, space, frames, tmp_path / "whole.npz", **options)
    tiny_model.reset_memory()
    with pytest.raises(Killed):
        collect_importance(tiny_model, space, interrupted(frames, 2), tmp_path / "resumed.npz", **options)
    tiny_model.reset_memory()
    assert not (tmp_path / "resumed.npz").exists() and (tmp_path / "resumed.partial.npz").exists()
    seen = []
    resumed = collect_importance(
        tiny_model, space, (seen.append(1) or f for f in frames), tmp_path / "resumed.npz", **options
    )
    assert resumed.batches == whole.batches == 4
    assert not (tmp_path / "resumed.partial.npz").exists()
    for dimension in space.dimensions:
        for block, array in whole.scores[dimension.name].items():
            np.testing.assert_allclose(resumed.scores[dimension.name][block], array, rtol=1e-4, atol=1e-9)
    loaded = ImportanceTable.load(tmp_path / "resumed.npz", space)
    assert (loaded.weights, loaded.data, loaded.frames) == ("random", "frames", 4)
    assert loaded.total(dimension.name).shape == (dimension.copies, dimension.size)


def test_every_part_of_the_model_is_worth_something(tiny_model, space, tiny_frames, tmp_path):
    table = collect_importance(
        tiny_model, space, tiny_frames(2), tmp_path / "i.npz", num_batches=2, weights="random", progress=False
    )
    for dimension in space.dimensions:
        if dimension.sources:
            assert table.total(dimension.name).sum() > 0, dimension.name
    frozen = [p for n, p in tiny_model.named_parameters() if ".bn" in n]
    assert frozen and not any(p.requires_grad for p in frozen)


def test_damaged_or_foreign_tables_are_refused(tiny_model, space, tiny_frames, tmp_path):
    path = tmp_path / "i.npz"
    table = collect_importance(tiny_model, space, tiny_frames(1), path, num_batches=1, weights="random", progress=False)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(FileFormatError, match="truncated or corrupt"):
        ImportanceTable.load(path, space)
    foreign = ImportanceTable("other", "random", 1, 0, 1, table.scores)
    with pytest.raises(StructureMismatchError, match="another model"):
        foreign.check(space)
