"""Lidar detectors: what comes after the pillars is traced, cut and run as one graph; the pillars stay."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from mdp_mmdet3d.adapters import BirdEye, InputShape, adapter_of
from mdp_mmdet3d.adapters.bird_eye import DensePart
from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.space.builder import SpaceOptions
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = {"model.pts_backbone.layer_nums": [1, 1, 1]}
ONE_TASK = {"model.pts_bbox_head.tasks": [dict(num_class=1, class_names=["car"])]}
NAMES = ["centerpoint/centerpoint_pillar02_mdp.py", "pointpillars/pointpillars_secfpn_nus_mdp.py"]
GRID = (32, 32)


@pytest.mark.parametrize("name", NAMES)
def test_a_lidar_detector_is_cut_behind_its_pillars(name, random_kept, tmp_path):
    options = SMALL | (ONE_TASK if name.startswith("centerpoint") else {})
    adapter = adapter_of(read_config(CONFIGS / name, options), InputShape(0, *GRID))
    assert isinstance(adapter, BirdEye)
    model, _ = adapter.build(None)
    space = adapter.trace(model, SpaceOptions(3, 32, 8, 0.0, ()))
    space.save(tmp_path / "space.json")  # no number of numpy's
    names = [dimension.name for dimension in space.dimensions]
    assert any(name.startswith("pts_backbone") for name in names)
    assert not any("encoder" in name for name in names)
    assert {"pts_voxel_encoder", "pts_middle_encoder"} <= {left.module for left in space.not_prunable}

    kept, removed = random_kept(space, np.random.default_rng(0), 0.0)
    plan = PruningPlan.from_kept(space, kept, removed)
    features = torch.randn(1, 64, *GRID, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pruned = flat(DensePart(apply_plan(copy.deepcopy(model), plan).eval())(features))
        masked = flat(DensePart(mask_model(copy.deepcopy(model), plan).eval())(features))
    assert len(pruned) == len(masked) > 2
    for found, expected in zip(pruned, masked):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_frames_are_the_maps_that_the_model_computes_itself(monkeypatch):
    adapter = adapter_of(read_config(CONFIGS / NAMES[0], SMALL), InputShape(0, 512, 512))
    model, _ = adapter.build(None)
    points = torch.rand(200, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([80.0, 80, 4, 1, 1]) - 2
    batch = {"inputs": {"points": [points]}}
    monkeypatch.setattr(adapter, "importance_batches", lambda: iter([batch]))
    monkeypatch.setattr(adapter, "calibration_batches", lambda *_: iter([batch]))
    seen = []
    model.pts_backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    (frame,) = adapter.frames(model, 1)
    with torch.no_grad():
        model.extract_feat(model.data_preprocessor(batch, False)["inputs"], [])
    np.testing.assert_allclose(frame, seen[0].numpy(), rtol=1e-5, atol=1e-6)
    assert frame.shape == (1, 64, 512, 512) and np.abs(frame).max() > 0

    (calibration,) = adapter.calibration_frames(model, 1)
    monkeypatch.setattr(adapter, "importance_batches", lambda: iter([]))
    seen.clear()
    model.pts_bbox_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        calibration(model)
    assert len(seen) == 2  # backbone and head ran, without data and without encoders
    np.testing.assert_allclose(seen[0].numpy(), frame, rtol=1e-5, atol=1e-6)


def test_a_detector_with_cameras_as_well_is_refused():
    adapter = adapter_of(read_config(CONFIGS / NAMES[0], SMALL), InputShape(0, *GRID))
    model, _ = adapter.build(None)
    model.img_backbone = torch.nn.Identity()
    with pytest.raises(MdpError, match="image backbone"):
        adapter.trace(model)


def flat(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [item for part in (value.values() if isinstance(value, dict) else value) for item in flat(part)]
