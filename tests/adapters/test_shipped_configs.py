"""Configs of other packages' models as they are shipped: traced, verified, blocks removable, pruned equals masked."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from mdp_mmdet3d.adapters import InputShape, adapter_of
from mdp_mmdet3d.adapters.single_graph_export import TensorMode
from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.space.builder import SpaceOptions
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SIZE = (64, 64)


@pytest.mark.parametrize(
    "name,multiple,dimensions,blocks",
    [
        pytest.param("resnet/resnet50_mdp.py", 16, 37, 16, marks=pytest.mark.slow),
        pytest.param("retinanet/retinanet_r50_mdp.py", 16, 47, 16, marks=pytest.mark.slow),
        ("fashion_detection/ssd_mdp.py", 8, 14, 8),
        ("fashion_detection/deformable_detr_mdp.py", 8, 31, 21),
    ],
)
def test_a_shipped_config_is_pruned_as_it_is(name, multiple, dimensions, blocks, random_kept):
    if name.startswith("resnet"):
        pytest.importorskip("mmpretrain")
    adapter = adapter_of(read_config(CONFIGS / name), InputShape(0, *SIZE))
    model, _ = adapter.build(None)
    space = adapter.trace(model, SpaceOptions(4, multiple, 8, 0.0, ()))
    assert len(space.dimensions) == dimensions and len(space.blocks) == blocks
    kept, removed = random_kept(space, np.random.default_rng(0), 0.3)
    assert removed
    plan = PruningPlan.from_kept(space, kept, removed)
    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pruned = TensorMode(apply_plan(copy.deepcopy(model), plan).eval(), SIZE)(image)
        masked = TensorMode(mask_model(copy.deepcopy(model), plan).eval(), SIZE)(image)
    for found, expected in zip(pruned, masked, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
