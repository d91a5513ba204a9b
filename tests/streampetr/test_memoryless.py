"""StreamPETR without its memory, as configs/petr has it: one frame says nothing to the next, whole line included."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from mmdet3d.registry import MODELS

from mdp_mmdet3d.adapters import InputShape, trace_space
from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan
from projects.streampetr.compare import check_against_pytorch
from projects.streampetr.export import export_streampetr

from ..conftest import ROOT
from ..tiny_deployment import CLASS_NAMES, INPUT_SIZE, make_frames

HEAD = "pts_bbox_head"


@pytest.fixture
def model(tiny_config):
    config = tiny_config()
    petr = read_config(ROOT / "configs/petr/petr_r50_mdp.py").model.pts_bbox_head
    config.pts_bbox_head.update({key: petr[key] for key in ("num_propagated", "memory_len", "topk_proposals")})
    torch.manual_seed(0)
    return MODELS.build(config).eval()


def predicted(model, batches):
    """Scores of the last level, frame by frame, of one stream."""
    model.reset_memory()
    with torch.no_grad():
        return [
            model(**model.data_preprocessor(batch, False), mode="tensor")["all_cls_scores"][-1] for batch in batches
        ]


def test_a_frame_is_the_same_in_every_stream(model, tiny_frames):
    stream = predicted(model, tiny_frames(2))
    alone = predicted(model, tiny_frames(2)[1:])
    torch.testing.assert_close(stream[1], alone[0])
    assert (stream[0] - stream[1]).abs().max() > 1e-3


def test_what_is_constant_without_a_memory_is_left_alone_and_a_plan_applies(model, random_kept, tiny_frames):
    space = trace_space(model, InputShape(6, 64, 176))
    left = {item.module for item in space.not_prunable}
    assert {
        f"{HEAD}.{name}.out" for name in ("query_embedding.0", "ego_pose_pe.reduce.0", "ego_pose_memory.reduce.0")
    } <= left
    assert f"{HEAD}.memory_embed.0.out" in {d.name for d in space.dimensions}
    kept, removed = random_kept(space, np.random.default_rng(0), 0.2)
    plan = PruningPlan.from_kept(space, kept, removed)
    pruned = predicted(apply_plan(copy.deepcopy(model), plan).eval(), tiny_frames(1))[0]
    masked = predicted(mask_model(copy.deepcopy(model), plan).eval(), tiny_frames(1))[0]
    torch.testing.assert_close(pruned, masked, rtol=1e-4, atol=1e-4 * float(masked.abs().max()))


def test_graphs_have_no_memory_and_equal_the_model_over_a_stream(model, tmp_path):
    export_streampetr(model, tmp_path / "deploy", class_names=CLASS_NAMES, input_size=INPUT_SIZE)
    manifest = DeploymentManifest.load(tmp_path / "deploy")
    assert [spec.name for spec in manifest.engines["head"].inputs] == ["x", "pos_embed", "cone"]
    assert [spec.name for spec in manifest.engines["head"].outputs] == ["all_cls_scores", "all_bbox_preds"]
    assert (manifest.memory.pre_length, manifest.memory.post_length) == (0, 0)
    check = check_against_pytorch(model, tmp_path / "deploy", make_frames(3))
    assert max(check["free_running"].values()) < 1e-4
    assert check["teacher_forced"]["memory"] == 0.0


@pytest.mark.parametrize("options", [{"layout": "autoware"}, {"prev_exists": True}])
def test_what_is_about_a_memory_is_refused_without_one(model, tmp_path, options):
    with pytest.raises(DeploymentError, match="no memory"):
        export_streampetr(model, tmp_path / "deploy", class_names=CLASS_NAMES, input_size=INPUT_SIZE, **options)
    assert not list(tmp_path.iterdir())
