"""The embedding width of transformers: found by following channels, cut everywhere, priced, chosen exactly."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import nn

from mdp_mmdet3d.adapters import InputShape
from mdp_mmdet3d.adapters.single_graph import SingleGraph
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.latency.backends.fake import FakeBackend
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.predict import LatencyModel
from mdp_mmdet3d.layers.fused import without_fused_layers
from mdp_mmdet3d.operators import OPERATORS
from mdp_mmdet3d.solver import solve
from mdp_mmdet3d.solver.build import LATENCY, Ranking, build_problem, kept_elements
from mdp_mmdet3d.space.builder import SpaceOptions
from mdp_mmdet3d.space.types import DimensionKind, PruningSpace
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan

OPTIONS = SpaceOptions(4, 8, 4, embed_width=True)


class Sines(nn.Module):
    """A position embedding computed from nothing."""

    def forward(self, x):
        steps = torch.arange(x.shape[1], dtype=x.dtype)[:, None] / torch.arange(1, 33, dtype=x.dtype)
        return torch.cat((steps[:, :16].sin(), steps[:, 16:].cos()), dim=1)[None]


class Detector(nn.Module):
    """An encoder and a decoder of torch's layers with queries, group norm, positions, and a norm without weights."""

    def __init__(self, groups=4, reshaped=False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(16, 32, 1), nn.GroupNorm(groups, 32))
        self.positions, self.plain = Sines(), nn.LayerNorm(32, elementwise_affine=False)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.query = nn.Embedding(5, 64)
        self.decoder = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True)
        self.head, self.reshaped = nn.Linear(32, 6), reshaped

    def forward(self, inputs, data_samples=None, mode="tensor"):
        x = self.project(self.stem(inputs)).flatten(2).transpose(1, 2)
        memory = self.encoder(self.plain(x) + self.positions(x))
        query, start = self.query.weight[None].split(self.query.weight.shape[1] // 2, dim=-1)
        if self.reshaped:
            query = query.reshape(1, 5, 4, 8).transpose(2, 3).flatten(2)
        return (self.head(self.decoder(start + query, memory)),)


def built(**options):
    torch.manual_seed(0)
    model = Detector(**options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return model.eval()


def traced(model, options=OPTIONS):
    return SingleGraph(Config({}), InputShape(1, 32, 32)).trace(model, options)


@pytest.fixture(scope="module")
def detector():
    model = built()
    return model, traced(model)


def embed(space):
    return next(d for d in space.dimensions if d.kind is DimensionKind.EMBED_WIDTH)


def test_everything_that_the_stream_passes_is_a_member(detector):
    _, space = detector
    width = embed(space)
    assert (width.name, width.size, width.options) == ("embed", 4, (1, 2, 3, 4))  # groups of 8 channels
    where = {(m.tensor, m.axis, m.offset, m.width) for m in width.members}
    assert where >= {
        ("project.0.weight", 0, 0, 8), ("project.1.bias", 0, 0, 8), ("encoder.self_attn.in_proj_weight", 1, 0, 8),
        ("encoder.self_attn.out_proj.bias", 0, 0, 8), ("encoder.linear1.weight", 1, 0, 8),
        ("query.weight", 1, 0, 8), ("query.weight", 1, 32, 8), ("decoder.multihead_attn.in_proj_weight", 1, 0, 8),
        ("head.weight", 1, 0, 8), ("positions()", 2, 0, 8), ("plain()", 2, 0, 8),
    }  # fmt: skip
    assert not any(tensor in ("stem.0.weight", "encoder.linear1.bias", "head.bias") for tensor, *_ in where)
    written = {axis.tensor for source in width.sources for axis in source.axes}
    assert {"project.0.weight", "encoder.norm1.weight", "query.weight", "decoder.linear2.bias"} <= written
    assert not written & {"encoder.linear1.weight", "head.weight", "decoder.self_attn.in_proj_weight"}
    terms = {t.signature.kind for t in space.terms if width.name in t.dimensions}
    assert {"stream_attention", "conv", "linear", "call"} <= terms


@pytest.mark.parametrize("seed", range(3))
def test_cut_masked_reloaded_and_exported_are_equal(seed, detector, random_kept, tmp_path):
    model, space = detector
    kept, _ = random_kept(space, np.random.default_rng(seed), 0.0)
    removed = {"encoder.self_attn"} if seed == 1 else set()
    kept["embed"] = (((1, 3), (0, 2, 3), (2,))[seed],)
    plan = PruningPlan.from_kept(space, kept, removed)
    plan = PruningPlan.from_dict(plan.to_dict())
    pruned, masked = (f(copy.deepcopy(model), plan).eval() for f in (apply_plan, mask_model))
    assert pruned.head.in_features == 8 * len(kept["embed"][0]) == pruned.decoder.norm3.normalized_shape[0]
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))[:1]
    with torch.no_grad(), without_fused_layers():
        found, expected = pruned(image)[0], masked(image)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    stored = io.BytesIO()
    torch.save(pruned.state_dict(), stored)
    stored.seek(0)
    again = apply_plan(built(), plan).eval()
    again.load_state_dict(torch.load(stored, weights_only=True))
    with torch.no_grad(), without_fused_layers():
        assert torch.equal(again(image)[0], found)
    adapter = SingleGraph(Config({}), InputShape(1, 32, 32))
    adapter.export(pruned, tmp_path / "out", plan_hash=plan.hash, weights="random")
    with without_fused_layers():
        assert adapter.compare(masked, tmp_path / "out", [image.numpy()])["outputs"] <= 1e-4


def test_the_program_is_solved_over_all_widths(detector, tmp_path):
    space = detector[1]
    space.save(tmp_path / "space.json")
    space = PruningSpace.load(tmp_path / "space.json")

    def work(signature, widths):
        return 1e-3 + 1e-6 * OPERATORS[signature.kind].work(signature, widths).macs

    table = measure_latency(space, FakeBackend(work), tmp_path / "table.json", policy="exact", progress=False)
    fitted = LatencyModel.from_dense(space, table, {"model": 1.0})
    rng = np.random.default_rng(0)
    scores = {d.name: {s.block: rng.exponential(size=(d.copies, d.size)) for s in d.sources} for d in space.dimensions}
    importance = ImportanceTable(space.model_digest, "random", 1, 0, 1, scores)
    ranking = Ranking.by_importance(space, importance)
    problem = build_problem(space, importance, fitted, ranking)
    assert [problem.dimensions[d].name for d in problem.global_dimensions] == ["embed"]
    result = solve(problem, {LATENCY: 0.5 * problem.dense.costs[LATENCY]})
    assert result.combinations.total == 4 and result.gap <= 1e-6
    kept, removed = kept_elements(space, ranking, result.plan)
    plan = PruningPlan.from_kept(space, kept, removed)
    predicted = fitted.predict(plan.widths(space), plan.removed)
    assert predicted == pytest.approx(problem.evaluate(result.plan).costs[LATENCY], rel=1e-9)


def test_without_the_option_and_frozen_it_stays():
    model = built()
    assert all(d.kind is not DimensionKind.EMBED_WIDTH for d in traced(model, SpaceOptions(4, 8, 4)).dimensions)
    frozen = traced(model, SpaceOptions(4, 8, 4, freeze=("embed",), embed_width=True))
    assert {n.module: n.reason for n in frozen.not_prunable}["embed"] == "frozen by the config"
    assert {t.signature.kind for t in frozen.terms} >= {"attention"}


@pytest.mark.parametrize(
    "options, reason", [(dict(reshaped=True), "reshape"), (dict(groups=1), "can only go as a whole")]
)
def test_what_cannot_be_followed_is_left_alone_with_the_reason(options, reason):
    space = traced(built(**options))
    assert reason in {n.module: n.reason for n in space.not_prunable}["embed"]
    assert all(d.kind is not DimensionKind.EMBED_WIDTH for d in space.dimensions)
