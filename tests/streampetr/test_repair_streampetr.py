"""Repair of a streaming detector: frames from the dense model's memory, outputs nearer to the dense ones."""

from __future__ import annotations

import copy

import numpy as np
import torch

from mdp_mmdet3d.adapters import InputShape, trace_space
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.plan import PruningPlan
from mdp_mmdet3d.surgery.repair import RepairSettings, repair
from projects.streampetr import calibration
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
    torch.testing.assert_close(rows, torch.cat(streamed), rtol=1e-4, atol=1e-4)


def test_a_repaired_detector_is_nearer_to_the_dense_one(tiny_model, tiny_frames, random_selection, monkeypatch):
    monkeypatch.setattr(calibration, "PIXELS_TOGETHER", 1)
    space = trace_space(tiny_model, InputShape(6, 64, 176))
    kept, _ = random_selection(space, np.random.default_rng(1), 0.0)
    path = "pts_bbox_head.transformer.decoder.layers"
    plan = PruningPlan.from_selection(space, kept, {f"{path}.0.ffns.0", "img_backbone.layer3.1"})
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
