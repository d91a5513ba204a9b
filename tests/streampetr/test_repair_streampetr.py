"""Repair of a streaming detector: frames from the dense model's memory, outputs nearer to the dense ones."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from mdp_mmdet3d.adapters import InputShape, trace_space
from mdp_mmdet3d.space.types import DimensionKind, TensorAxis
from mdp_mmdet3d.surgery.apply import apply_plan, model_digest
from mdp_mmdet3d.surgery.plan import Cut, PruningPlan
from mdp_mmdet3d.surgery.repair import RepairSettings, repair
from mdp_mmdet3d.surgery.repair.weights import BACKGROUND
from projects.streampetr import calibration
from projects.streampetr.attention import MultiheadAttention
from projects.streampetr.calibration import calibration_frames


def outputs(model, frame):
    with torch.no_grad():
        output, _ = frame(model)
    return output.all_cls_scores, output.all_bbox_preds


def test_frames_are_those_of_the_stream_and_repeat(tiny_model, tiny_frames, monkeypatch):
    batches = tiny_frames(4)
    streamed = []
    tiny_model.reset_memory()
    with torch.no_grad():
        for batch in batches:
            data = tiny_model.data_preprocessor(dict(batch), False)
            streamed.append(tiny_model(**data, mode="tensor")["all_cls_scores"][-1])
    monkeypatch.setattr(calibration, "PIXELS_TOGETHER", 1)
    alone = calibration_frames(tiny_model, batches, 4)
    assert len(alone) == 4
    for frame, expected in zip(alone, streamed):
        for _ in range(2):
            torch.testing.assert_close(outputs(tiny_model, frame)[0][-1], expected, rtol=1e-4, atol=1e-4)
    skipped = calibration_frames(tiny_model, batches, 2, stride=2)
    torch.testing.assert_close(outputs(tiny_model, skipped[1])[0][-1], streamed[2], rtol=1e-4, atol=1e-4)

    monkeypatch.undo()
    together = calibration_frames(tiny_model, batches, 4)
    assert len(together) == 1
    rows = outputs(tiny_model, together[0])[0][-1]
    expected = rows.sigmoid().amax(dim=-1) + BACKGROUND  # a query counts by what is detected in it
    torch.testing.assert_close(together[0].weights, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows, torch.cat(streamed), rtol=1e-4, atol=1e-4)


def test_a_repaired_detector_is_nearer_to_the_dense_one(tiny_model, tiny_frames, random_kept, monkeypatch):
    monkeypatch.setattr(calibration, "PIXELS_TOGETHER", 1)
    space = trace_space(tiny_model, InputShape(6, 64, 176))
    kept, _ = random_kept(space, np.random.default_rng(1), 0.0)
    path = "pts_bbox_head.transformer.decoder.layers"
    plan = PruningPlan.from_kept(space, kept, {f"{path}.0.ffns.0", "img_backbone.layer3.1"})
    *frames, unseen = calibration_frames(tiny_model, tiny_frames(5), 5)
    pruned = apply_plan(copy.deepcopy(tiny_model), plan)
    raw = copy.deepcopy(pruned)
    report = {layer.name: layer for layer in repair(tiny_model, pruned, plan, frames, RepairSettings()).layers}
    (scores, boxes), before, after = (outputs(model, unseen) for model in (tiny_model, raw, pruned))
    assert (after[0] - scores).norm() < 0.5 * (before[0] - scores).norm()
    assert (after[1] - boxes).norm() < 0.8 * (before[1] - boxes).norm()
    assert report["img_backbone.layer3.0.conv2 (sum)"].left == "" or report["img_backbone.layer2.1.conv2 (sum)"]
    assert report["pts_bbox_head.transformer.decoder.post_norm"].calls == 3
    # One module under six names is one layer.
    assert "pts_bbox_head.cls_branches.0.0" in report and "pts_bbox_head.cls_branches.1.0" not in report


def test_packed_projections_are_refitted_one_by_one():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.attn = nn.Linear(8, 8), MultiheadAttention(8, 2)

        def forward(self, x):
            y = self.before(x)
            return self.attn(x, y, value=x - y)

    torch.manual_seed(0)
    model = Attending().eval()
    axis = TensorAxis("attn.in_proj_weight", 0), TensorAxis("attn.in_proj_bias", 0)
    cut = Cut(DimensionKind.QK_WIDTH, 4, ((0, 1, 3), (0, 2, 3)), axis)
    keys = Cut(DimensionKind.QK_WIDTH, 4, cut.kept, tuple(replace(member, offset=8) for member in axis))
    plan = PruningPlan(model_digest(model), {"attn.qk": cut, "attn.keys": keys}, {})
    pruned = apply_plan(copy.deepcopy(model), plan)
    pruned.attn.qk_head_dim = 3
    exact = pruned.attn.in_proj_weight.detach().clone()
    with torch.no_grad():
        pruned.attn.in_proj_weight[:6] *= 0.5
        pruned.attn.in_proj_bias[12:] += 0.3
    inputs = [torch.randn(4, 20, 8) for _ in range(4)]
    frames = [lambda net, x=x: net(x) for x in inputs]
    report = {layer.name: layer for layer in repair(model, pruned, plan, frames, RepairSettings(ridge=1e-7)).layers}
    torch.testing.assert_close(pruned.attn.in_proj_weight, exact, rtol=1e-3, atol=1e-4)
    assert report["attn.key"].left == "it equals the dense model's" and report["attn.key"].samples == 240
    assert report["attn.query"].held_out[0] > 0.3 > 1e-3 > report["attn.query"].held_out[1]
    assert not report["attn.value"].left and "attn" not in report
