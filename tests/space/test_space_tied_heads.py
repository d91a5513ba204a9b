"""One width for q/k and v of an attention: what is cut, what it is worth, what it costs."""

import copy
from itertools import product
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.importance.taylor import TaylorAccumulator
from mdp_mmdet3d.layers import PackedSelfAttention
from mdp_mmdet3d.solver import ProblemStructure, SolveStatus, solve
from mdp_mmdet3d.solver.build import LATENCY, Ranking, build_problem, kept_elements
from mdp_mmdet3d.space import DimensionKind, PruningSpace
from mdp_mmdet3d.space.attention import add_attention
from mdp_mmdet3d.space.builder import SpaceBuilder, SpaceOptions
from mdp_mmdet3d.surgery.apply import apply_plan, model_digest
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan

HEADS, WIDTH = 3, 8
SIZE = HEADS * WIDTH


class Cross(nn.Module):
    """StreamPETR's attention."""

    names: ClassVar[dict] = {}

    def __init__(self):
        super().__init__()
        from projects.streampetr.attention import MultiheadAttention

        self.attn = MultiheadAttention(SIZE, HEADS)
        nn.init.normal_(self.attn.in_proj_bias)

    def forward(self, x):
        return self.attn(x, x + 1, x)


class Packed(nn.Module):
    """A vision transformer's."""

    names: ClassVar[dict] = {"packed": ("qkv.weight", "qkv.bias"), "out": "proj.weight"}

    def __init__(self):
        super().__init__()
        qkv, proj = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)
        self.attn = PackedSelfAttention(qkv, proj, HEADS, WIDTH, WIDTH, WIDTH**-0.5)

    def forward(self, x):
        return self.attn(x)


class Projected(nn.Module):
    """An attention with a linear layer each for queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.q, self.k, self.v, self.out = (nn.Linear(SIZE, SIZE) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Separate(nn.Module):
    """One that is replaced when it is cut."""

    names: ClassVar[dict] = {
        "separate": tuple((f"{part}.weight", f"{part}.bias") for part in "qkv"),
        "out": "out.weight",
    }

    def __init__(self):
        super().__init__()
        self.attn = Projected()

    def forward(self, x):
        return self.attn(x)


def space_of(net, tied):
    builder = SpaceBuilder(net, SpaceOptions(head_width_multiple=2, tie_head_widths=tied))
    widths = add_attention(builder, "attn", HEADS, WIDTH, WIDTH, **net.names)
    builder.add_term("attn", "head", "attention", widths, queries=5, keys=5, embed_dims=SIZE, shared=True)
    return builder.finish("Net", model_digest(net))


@pytest.fixture(params=[Cross, Packed, Separate])
def net(request):
    torch.manual_seed(0)
    return request.param().eval()


def test_what_is_pruned_equals_what_is_masked_and_widths_are_equal(net, tmp_path):
    space = space_of(net, tied=True)
    assert {d.name: (d.kind, d.copies) for d in space.dimensions} == {
        "attn.heads": (DimensionKind.HEADS, 1),
        "attn.width": (DimensionKind.HEAD_WIDTH, 2 * HEADS),
    }
    space.save(tmp_path / "space.json")
    assert PruningSpace.load(tmp_path / "space.json") == space
    rng, x = np.random.default_rng(1), torch.randn(2, 5, SIZE)
    for heads, width in ((3, 4), (2, 6), (1, 2)):
        chosen = [tuple(rng.choice(WIDTH, width, replace=False).tolist()) for _ in range(2 * HEADS)]
        kept = {"attn.heads": (tuple(rng.choice(HEADS, heads, replace=False).tolist()),), "attn.width": tuple(chosen)}
        plan = PruningPlan.from_kept(space, kept, frozenset())
        plan.save(tmp_path / "plan.json")
        plan = PruningPlan.load(tmp_path / "plan.json")
        pruned, masked = apply_plan(copy.deepcopy(net), plan), mask_model(copy.deepcopy(net), plan)
        found = pruned.attn
        assert (found.num_heads, found.qk_head_dim, found.v_head_dim) == (heads, width, width)
        assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in net.parameters())
        with torch.no_grad():
            ours, theirs, dense = (model(x) for model in (pruned, masked, net))
        scale = float(dense.abs().max())
        assert float((ours - theirs).abs().max()) < 1e-5 * scale < 1e-2 * float((ours - dense).abs().max())


def test_scores_are_those_of_both_widths(net):
    x = torch.randn(2, 5, SIZE)
    found = {}
    for tied in (False, True):
        net.zero_grad()
        with TaylorAccumulator(net, space_of(net, tied)) as accumulator:
            net(x).square().sum().backward()
            accumulator.finish_batch()
            found[tied] = accumulator.table("random")
    apart = np.concatenate([found[False].total("attn.qk"), found[False].total("attn.v")])
    np.testing.assert_allclose(found[True].total("attn.width"), apart, rtol=1e-6)
    assert apart.min() > 0


class WorkLatency:
    """A fake device on which an attention costs its heads times both widths, and more where they differ."""

    total_fixed_ms = 1.0

    def __init__(self, space):
        self.space = space

    def cost_array(self, term):
        options = [self.space.by_name[name].options for name in term.dimensions]
        counts = [term.counts(dict(zip(term.dimensions, chosen))) for chosen in product(*options)]
        ms = np.array([heads * (qk + v) + 0.5 * (qk != v) for heads, qk, v in counts])
        return ms.reshape([len(o) for o in options]), np.zeros([len(o) for o in options], bool)


def test_a_tied_plan_is_worth_and_costs_what_the_same_plan_with_two_widths_does():
    net = Packed()
    apart, tied = space_of(net, False), space_of(net, True)
    rng = np.random.default_rng(0)
    qk, v = rng.exponential(size=(2, HEADS, WIDTH))
    qk[1] *= 5  # heads differ, and so do the rankings of their widths

    def problem(space, scores):
        table = ImportanceTable(space.model_digest, "random", 1, 0, 1, {"attn.heads": {}, **scores})
        ranking = Ranking.by_importance(space, table)
        return build_problem(space, table, WorkLatency(space), ranking), ranking

    two, ranking_of_two = problem(apart, {"attn.qk": {None: qk}, "attn.v": {None: v}})
    one, ranking = problem(tied, {"attn.width": {None: np.concatenate([qk, v])}})
    for heads, width in product(range(len(apart.by_name["attn.heads"].options)), range(4)):
        ours, theirs = ProblemStructure((heads, width), ()), ProblemStructure((heads, width, width), ())
        found, expected = one.evaluate(ours), two.evaluate(theirs)
        assert found.value == pytest.approx(expected.value)
        assert found.costs[LATENCY] == pytest.approx(expected.costs[LATENCY])
        kept, _ = kept_elements(tied, ranking, ours)
        both, _ = kept_elements(apart, ranking_of_two, theirs)
        assert kept["attn.width"] == both["attn.qk"] + both["attn.v"] and kept["attn.heads"] == both["attn.heads"]
    lost = 0
    for budget in (8.0, 14.0, 20.0, 27.0, 35.0):
        results = [solve(p, {LATENCY: budget}) for p in (one, two)]
        values = [p.evaluate(r.plan).value for p, r in zip((one, two), results)]
        assert [r.status for r in results] == [SolveStatus.OPTIMAL] * 2
        assert values[0] <= values[1] + 1e-9
        lost += values[0] < values[1] - 1e-9
    assert lost  # a tie is a restriction


def test_attentions_of_two_dense_widths_are_not_tied():
    qkv, proj = nn.Linear(SIZE, HEADS * (2 * 8 + 4)), nn.Linear(HEADS * 4, SIZE)
    net = Packed()
    net.attn = PackedSelfAttention(qkv, proj, HEADS, 8, 4, 1.0)
    builder = SpaceBuilder(net, SpaceOptions(head_width_multiple=2, tie_head_widths=True))
    assert add_attention(builder, "attn", HEADS, 8, 4, **net.names) == ("attn.heads", "attn.qk", "attn.v")
    assert "q/k width is 8, that of v 4" in builder.left_alone["attn.width"]
