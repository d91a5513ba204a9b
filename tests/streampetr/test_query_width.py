"""The width of queries, tokens and memory: cut everywhere, exported with other engine and memory shapes."""

from __future__ import annotations

import copy

import numpy as np
import onnxruntime as ort
import pytest
import torch

from mdp_mmdet3d.adapters import InputShape, trace_space
from mdp_mmdet3d.latency.graphs import operator_graph
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.runtime.stream import StreamRunner
from mdp_mmdet3d.space.builder import SpaceOptions
from mdp_mmdet3d.space.types import DimensionKind
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan
from mdp_mmdet3d.surgery.repair import RepairSettings, repair
from projects.streampetr import calibration
from projects.streampetr.calibration import calibration_frames
from projects.streampetr.export import export_streampetr

from ..numerics import COLUMNS, assert_close
from ..tiny_deployment import CLASS_NAMES, INPUT_SIZE

NAME = "pts_bbox_head.transformer.decoder.layers.embed"
SHAPE = InputShape(6, 64, 176)


@pytest.fixture
def space(tiny_model):
    return trace_space(tiny_model, SHAPE, SpaceOptions(embed_width=True))


def outputs(model, batches):
    found = []
    model.reset_memory()
    with torch.no_grad():
        for batch in batches:
            raw = model(**model.data_preprocessor(dict(batch), False), mode="tensor")
            found.append((raw["all_cls_scores"], raw["all_bbox_preds"]))
    return found


def test_the_width_is_one_dimension_of_the_whole_head(space):
    (width,) = (d for d in space.dimensions if d.kind is DimensionKind.EMBED_WIDTH)
    assert (width.name, width.size, width.options[0]) == (NAME, 256, 32)
    where = {(m.tensor.removeprefix("pts_bbox_head."), m.axis) for m in width.members}
    assert where >= {
        ("memory_embed.2.weight", 0), ("position_encoder.2.bias", 0), ("query_embedding.2.weight", 0),
        ("time_embedding.0.weight", 0), ("time_embedding.1.weight", 0), ("ego_pose_memory.gamma.weight", 0),
        ("ego_pose_memory.norm()", 2), ("spatial_alignment.beta.bias", 0), ("featurized_pe.conv_reduce.weight", 1),
        ("cls_branches.0.0.weight", 1), ("reg_branches.0.0.weight", 1), ("transformer.decoder.post_norm.weight", 0),
        ("transformer.decoder.layers.2.attentions.1.attn.in_proj_weight", 1),
        ("transformer.decoder.layers.2.ffns.0.layers.1.bias", 0),
    }  # fmt: skip
    sinusoids = {("query_embedding.0.weight", 1), ("time_embedding.0.weight", 1)}  # they keep their sizes
    assert not where & sinusoids
    head = [t for t in space.terms if t.engine == "head"]
    assert {t.signature.kind for t in head} == {"linear", "stream_attention", "stream_ffn", "call"}
    for term in (t for t in head if t.signature.kind == "call"):
        ort.InferenceSession(operator_graph(term.signature, (64,)).model.SerializeToString())  # its probe can be run
    assert not any(n.module == "pts_bbox_head.embed_dims" for n in space.not_prunable)


@pytest.mark.numerics
@pytest.mark.parametrize("seed", range(3))
def test_pruned_equals_masked_dense(seed, tiny_model, space, tiny_frames, random_kept):
    kept, removed = random_kept(space, np.random.default_rng(seed), 0.2)
    kept[NAME] = (tuple(np.random.default_rng(seed).permutation(256)[: (32, 96, 224)[seed]].tolist()),)
    plan = PruningPlan.from_kept(space, kept, removed)
    masked, pruned = (
        outputs(f(copy.deepcopy(tiny_model), plan), tiny_frames(1, seed)) for f in (mask_model, apply_plan)
    )
    for (cls_a, box_a), (cls_b, box_b) in zip(masked, pruned):
        assert_close(cls_a, cls_b)
        assert_close(box_a, box_b, COLUMNS, columns=True)


def test_engines_and_memory_have_the_width_of_the_plan(tiny_model, space, tmp_path, stream):
    plan = PruningPlan.from_kept(space, {NAME: (tuple(range(0, 256, 2)),)}, frozenset())
    pruned = apply_plan(tiny_model, plan)
    export_streampetr(pruned, tmp_path / "out", class_names=CLASS_NAMES, input_size=INPUT_SIZE, plan_hash=plan.hash)
    manifest = DeploymentManifest.load(tmp_path / "out")
    shapes = {spec.name: spec.shape for spec in manifest.engines["head"].inputs}
    assert shapes["pre_memory_embedding"][-1] == shapes["pos_embed"][-1] == 128
    assert {s.name: s.shape for s in manifest.engines["head"].outputs}["post_memory_embedding"][-1] == 128
    runner = StreamRunner(tmp_path / "out")
    assert all(np.isfinite(runner.run(frame).cls_scores).all() for frame in stream[:2])


def test_a_narrow_stream_is_repaired(tiny_model, space, tiny_frames, monkeypatch):
    monkeypatch.setattr(calibration, "PIXELS_TOGETHER", 1)
    scores = np.random.default_rng(0).permutation(256)
    plan = PruningPlan.from_kept(space, {NAME: (tuple(sorted(scores[:224].tolist())),)}, frozenset())
    *frames, unseen = calibration_frames(tiny_model, tiny_frames(4), 4)
    pruned = apply_plan(copy.deepcopy(tiny_model), plan)
    raw = copy.deepcopy(pruned)
    report = repair(tiny_model, pruned, plan, frames, RepairSettings())
    with torch.no_grad():
        dense, before, after = (unseen(model)[0] for model in (tiny_model, raw, pruned))
    assert any(not layer.left and "decoder" in layer.name for layer in report.layers)
    for name in ("all_cls_scores", "all_bbox_preds"):
        wanted, cut, repaired = (getattr(found, name) for found in (dense, before, after))
        assert (repaired - wanted).norm() < 0.8 * (cut - wanted).norm(), name
