"""The number of learned queries: cut, masked, scored by a gate, exported, repaired, trained on; kept where needed."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from mdp_mmdet3d.adapters import InputShape, trace_space
from mdp_mmdet3d.errors import MdpError, StructureMismatchError
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.importance.taylor import TaylorAccumulator
from mdp_mmdet3d.latency.graphs import operator_graph
from mdp_mmdet3d.layers.gated import GatedEmbedding
from mdp_mmdet3d.operators import OPERATORS, OperatorSignature
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.runtime.stream import StreamRunner
from mdp_mmdet3d.solver.build import Ranking, build_problem
from mdp_mmdet3d.space.builder import SpaceOptions
from mdp_mmdet3d.space.types import GLOBAL_KINDS, DimensionKind
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan
from mdp_mmdet3d.surgery.repair import RepairSettings, repair
from projects.streampetr import calibration
from projects.streampetr.autoware import package_autoware
from projects.streampetr.calibration import calibration_frames
from projects.streampetr.distillation import Distillation
from projects.streampetr.export import export_streampetr
from projects.streampetr.head_runs import HeadRuns
from projects.streampetr.query_count import NAME, least_queries

from ..numerics import COLUMNS, assert_close
from ..tiny_deployment import CLASS_NAMES, INPUT_SIZE

SHAPE = InputShape(6, 64, 176)
WIDTH = "pts_bbox_head.transformer.decoder.layers.embed"


@pytest.fixture
def space(tiny_model):
    return trace_space(tiny_model, SHAPE, SpaceOptions(queries=True))


def queries_plan(space, kept) -> PruningPlan:
    return PruningPlan.from_kept(space, {NAME: (tuple(sorted(int(e) for e in kept)),)}, frozenset())


def test_the_number_is_one_dimension_and_what_runs_on_queries_depends_on_it(space):
    (queries,) = (d for d in space.dimensions if d.kind is DimensionKind.QUERIES)
    assert (queries.name, queries.size, queries.options) == (NAME, 60, (16, 32, 48, 60))
    kinds = {t.signature.kind for t in space.terms if NAME in t.dimensions}
    assert kinds == {"query_attention", "query_ffn", "query_linear", "call"}
    depending = {t.name for t in space.terms if NAME in t.dimensions and t.signature.kind != "call"}
    layers = [f"pts_bbox_head.transformer.decoder.layers.{i}" for i in range(3)]
    assert depending == {
        *(f"{layer}.{part}" for layer in layers for part in ("attentions.0.attn", "attentions.1.attn", "ffns.0")),
        *(f"pts_bbox_head.cls_branches.0.{i}" for i in (0, 3, 6)),
        *(f"pts_bbox_head.reg_branches.0.{i}" for i in (0, 2, 4)),
    }
    # The learned queries' positions are constants: no sine and no embedding of theirs is a term.
    assert not any("sin" in t.name or "query_embedding" in t.name for t in space.terms if NAME in t.dimensions)
    for term in (t for t in space.terms if t.signature.kind == "call"):
        operator_graph(term.signature, (24,))  # its probe can be built
    assert not any(n.module == "pts_bbox_head.reference_points" for n in space.not_prunable)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("embed", [None, 32])
def test_operators_with_queries_to_choose_are_the_same_at_that_number(shared, embed):
    def check(kind, widths, opened, fixed_attributes, **attributes):
        base = OperatorSignature.make(kind, **fixed_attributes)
        chosen = OperatorSignature.make(f"query_{'stream_' if embed else ''}{kind}", **attributes)
        assert OPERATORS[chosen.kind].roles[-1] == "queries"
        full = (*widths, *([embed] if embed else []), 12)
        assert OPERATORS[chosen.kind].work(chosen, full) == OPERATORS[kind].work(base, widths)
        assert operator_graph(chosen, full, "float32").model == operator_graph(base, widths, "float32").model
        call, inputs = OPERATORS[chosen.kind].torch_call(chosen, full)
        assert call(*inputs).shape[1] == 12

    size = {} if embed else {"embed_dims": 32}
    check(
        "attention", (2, 8, 16), embed, dict(queries=12, keys=20, embed_dims=32, shared=shared),
        keys=8 if shared else 20, shared=shared, **size,
    )  # fmt: skip
    check("ffn", (48,), embed, dict(tokens=12, embed_dims=32), **size)


@pytest.mark.numerics
@pytest.mark.parametrize("embed_width", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_pruned_equals_masked_dense_for_any_kept_queries(seed, embed_width, tiny_model, tiny_frames, random_kept):
    """Masked: no other query sees it, and what it predicts is left out. Memory and propagated queries as dense."""
    space = trace_space(tiny_model, SHAPE, SpaceOptions(queries=True, embed_width=embed_width))
    rng = np.random.default_rng(seed)
    kept, removed = ({}, frozenset()) if seed == 3 else random_kept(space, rng, 0.2)
    kept[NAME] = (tuple(sorted(rng.permutation(60)[: (16, 32, 48, 16)[seed]].tolist())),)
    if embed_width:
        kept[WIDTH] = (tuple(sorted(rng.permutation(256)[: (32, 96, 224, 128)[seed]].tolist())),)
    plan = PruningPlan.from_kept(space, kept, removed)
    (frame,) = calibration_frames(tiny_model, tiny_frames(2, seed), 2)  # one that starts a stream, one with a memory
    with torch.no_grad():
        masked, pruned = (frame(f(copy.deepcopy(tiny_model), plan))[0] for f in (mask_model, apply_plan))
    assert pruned.all_cls_scores.shape[1:3] == (2, len(kept[NAME][0]) + 16)
    assert_close(pruned.all_cls_scores, masked.all_cls_scores)
    assert_close(pruned.all_bbox_preds, masked.all_bbox_preds, COLUMNS, columns=True)
    assert torch.equal(pruned.reference_points, masked.reference_points)


def test_a_query_s_score_is_the_derivative_of_its_gate_times_what_it_scored(tiny_model, space):
    model = tiny_model.double()
    run = HeadRuns(model, (2, 2, 3)).frame
    queries = model.pts_bbox_head.reference_points

    def loss():
        scores, boxes, _ = run(model)  # the memory is detached
        return scores.sigmoid().square().sum() + boxes.square().mean()

    with TaylorAccumulator(model, space) as accumulator:
        loss().backward()
        assert accumulator.finish_batch()
        found = accumulator.table("random").total(NAME)[0]
        probabilities = queries.scores.numpy()
    assert queries.gates is None and queries.scores is None
    for index in (0, 17, 59):
        ends = []
        for step in (-1e-6, 1e-6):
            queries.gates = torch.ones(60, dtype=torch.float64)
            queries.gates[index] += step
            with torch.no_grad():
                ends.append(float(loss()))
        slope = (ends[1] - ends[0]) / 2e-6
        assert abs(slope) > 1e-6
        assert found[index] == pytest.approx(abs(slope) * probabilities[index], rel=1e-4)


def test_manifest_runtime_and_autoware_have_the_number_of_the_plan(tiny_model, space, tmp_path, stream):
    plan = queries_plan(space, np.random.default_rng(0).permutation(60)[:32])
    pruned = apply_plan(tiny_model, plan)
    folder = tmp_path / "out"
    export_streampetr(
        pruned, folder, class_names=CLASS_NAMES, input_size=INPUT_SIZE, plan_hash=plan.hash, layout="autoware"
    )
    manifest = DeploymentManifest.load(folder)
    assert manifest.num_queries == 32 + 16
    outputs = {spec.name: spec.shape for spec in manifest.engines["head"].outputs}
    assert outputs["all_cls_scores"] == (1, 10, 48) and outputs["post_memory_embedding"] == (1, 80, 256)
    runner = StreamRunner(folder)
    for frame in stream[:2]:
        assert len(runner.run(frame).cls_scores[0, 0]) == 48
    package_autoware(folder, tmp_path / "package", node="0.53")
    texts = {
        path.name: path.read_text() for path in (tmp_path / "package").rglob("*") if path.suffix in (".yaml", ".md")
    }
    assert any(re.search(r"num_proposals: 48\b", text) for text in texts.values())
    assert any("48 queries" in text for text in texts.values())


def test_what_stays_is_repaired_to_the_dense_model_without_the_cut_queries(tiny_model, space, tiny_frames, monkeypatch):
    monkeypatch.setattr(calibration, "PIXELS_TOGETHER", 1)
    kept = {
        d.name: (tuple(range(0, d.size, 2)),) * d.copies for d in space.dimensions if d.kind is DimensionKind.HIDDEN
    }
    kept = {name: copies for name, copies in kept.items() if len(copies[0]) in space.by_name[name].options}
    few = tuple(sorted(np.random.default_rng(0).permutation(60)[:48].tolist()))
    plan = PruningPlan.from_kept(space, {**kept, NAME: (few,)}, frozenset())
    *frames, unseen = calibration_frames(tiny_model, tiny_frames(4), 4)
    pruned = apply_plan(copy.deepcopy(tiny_model), plan)
    raw = copy.deepcopy(pruned)
    report = repair(tiny_model, pruned, plan, frames, RepairSettings())
    assert any(not layer.left and "decoder" in layer.name for layer in report.layers)
    without = apply_plan(copy.deepcopy(tiny_model), queries_plan(space, few))
    with torch.no_grad():
        wanted, before, after = (unseen(model)[0] for model in (without, raw, pruned))
    for name in ("all_cls_scores", "all_bbox_preds"):
        target, cut, repaired = (getattr(found, name) for found in (wanted, before, after))
        assert (repaired - target).norm() < 0.8 * (cut - target).norm(), name


def test_a_pruned_model_trains_with_denoising_queries(tiny_model, space, tiny_frames):
    pruned = apply_plan(tiny_model, queries_plan(space, range(12, 28))).train()
    optimizer = torch.optim.AdamW([p for p in pruned.parameters() if p.requires_grad], 1e-4)
    points = pruned.pts_bbox_head.reference_points.weight.detach().clone()
    for batch in tiny_frames(2):
        losses = pruned(**pruned.data_preprocessor(dict(batch), True), mode="loss")
        assert float(losses["dn_loss_cls"].detach()) > 0
        total, _ = pruned.parse_losses(losses)
        assert torch.isfinite(total)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert pruned.pts_bbox_head.reference_points.weight.shape == (16, 3)
    assert not torch.equal(pruned.pts_bbox_head.reference_points.weight, points)


class Latency:
    """A fake device: a term costs the product of its widths."""

    total_fixed_ms = 1.0

    def __init__(self, space):
        self.space = space

    def cost_array(self, term, sums=None):
        options = [self.space.by_name[name].options for name in term.dimensions]
        array = np.empty([len(o) for o in options])
        for index in np.ndindex(array.shape):
            chosen = {n: o[i] for n, o, i in zip(term.dimensions, options, index)}
            array[index] = 1e-6 * np.prod([float(count) for count in term.counts(chosen)])
        return array, np.zeros(array.shape, dtype=bool)


@pytest.mark.parametrize("embed_width", [False, True])
def test_the_program_is_solved_exactly_over_the_numbers_of_queries(embed_width, tiny_model):
    """Everything but queries, width and one FFN frozen: few enough plans to try them all."""
    import itertools

    from mdp_mmdet3d.solver import ProblemStructure, SolveStatus, solve

    options = SpaceOptions(queries=True, embed_width=embed_width, max_options=4)
    every = trace_space(tiny_model, SHAPE, options)
    ffn = "pts_bbox_head.transformer.decoder.layers.1.ffns.0.layers.0.0.out"
    block = "pts_bbox_head.transformer.decoder.layers.2"
    free = {ffn, NAME, WIDTH, block}
    frozen = tuple(x.name for x in (*every.dimensions, *every.blocks) if x.name not in free)
    space = trace_space(tiny_model, SHAPE, SpaceOptions(4, freeze=frozen, queries=True, embed_width=embed_width))
    assert {d.name for d in space.dimensions} | {b.name for b in space.blocks} == free - (
        {WIDTH} if not embed_width else set()
    )
    rng = np.random.default_rng(1)
    scores = {d.name: {s.block: rng.exponential(size=(d.copies, d.size)) for s in d.sources} for d in space.dimensions}
    importance = ImportanceTable(space.model_digest, "random", 1, 0, 1, scores)
    problem = build_problem(space, importance, Latency(space), Ranking.by_importance(space, importance))
    assert {problem.dimensions[i].name for i in problem.global_dimensions} == {
        d.name for d in space.dimensions if d.kind in GLOBAL_KINDS
    }
    plans = [
        ProblemStructure(chosen, (kept,))
        for chosen in itertools.product(*(range(len(d.options)) for d in problem.dimensions))
        for kept in (True, False)
    ]
    found = [(problem.evaluate(plan), plan) for plan in plans]
    dense = problem.dense.costs["latency_ms"]
    for share in (0.5, 0.7, 0.9):
        best = max(e.value for e, _ in found if e.costs["latency_ms"] <= share * dense)
        result = solve(problem, {"latency_ms": share * dense})
        assert result.status is SolveStatus.OPTIMAL
        assert problem.evaluate(result.plan).value == pytest.approx(best, rel=1e-9)


def test_the_setting_and_what_has_no_queries():
    assert PruneSettings.from_config(dict(queries=True)).space_options.queries
    with pytest.raises(MdpError, match="queries"):
        PruneSettings.from_config(dict(queries=100))

    class Plain(nn.Module):
        pass

    from mdp_mmdet3d.adapters import Adapter

    class PlainAdapter(Adapter):
        add_to_space = frames = export = compare = deploy = None

    PlainAdapter.__abstractmethods__ = frozenset()
    with pytest.raises(MdpError, match=r"^prune\.queries=True is not for a Plain: .*Leave it out$"):
        PlainAdapter({}, SHAPE).trace(Plain(), SpaceOptions(queries=True))


def test_queries_that_the_memory_and_post_processing_need_stay(tiny_config, tiny_model):
    from mmdet3d.registry import MODELS

    assert least_queries(tiny_model) == 14  # 300 pairs of 10 classes, 16 propagated
    config = tiny_config()
    config.pts_bbox_head.topk_proposals = 50  # with 16 propagated ones, 34 learned ones at least
    config.pts_bbox_head.memory_len = 64
    model = MODELS.build(config).eval()
    assert least_queries(model) == 34
    space = trace_space(model, SHAPE, SpaceOptions(queries=True))
    assert space.by_name[NAME].options == (48, 60)
    model.bbox_coder.max_num = 700  # of 10 classes each, 54 learned queries
    with pytest.raises(MdpError, match=r"prune\.queries=True: the 60 learned queries of this StreamPETR.*at least 54"):
        trace_space(model, SHAPE, SpaceOptions(queries=True))
    with pytest.raises(MdpError, match=r"prune\.queries=True"):
        trace_space(tiny_model, SHAPE, SpaceOptions(queries=True, min_keep=0.9))
    frozen = trace_space(tiny_model, SHAPE, SpaceOptions(queries=True, freeze=(NAME,)))
    assert NAME not in frozen.by_name and any(n.module == NAME for n in frozen.not_prunable)


def test_a_model_with_fewer_queries_is_not_distilled_query_by_query(tiny_model, space):
    student = apply_plan(copy.deepcopy(tiny_model), queries_plan(space, range(16)))
    with pytest.raises(StructureMismatchError, match=r"60 learned queries, the student 16.*prune\.queries"):
        Distillation(student, tiny_model)


def test_gates_are_no_state(tiny_model):
    queries = tiny_model.pts_bbox_head.reference_points
    assert isinstance(queries, GatedEmbedding)
    before = list(tiny_model.state_dict())
    queries.open_gates()
    assert list(tiny_model.state_dict()) == before and queries.left() is None
    queries.mask(torch.arange(60) % 2 == 0)
    assert queries.left().tolist() == list(range(0, 60, 2))
    assert torch.isinf(queries.key_bias()).sum() == 30
