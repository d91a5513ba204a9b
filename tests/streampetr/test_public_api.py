"""MMDetection3D's own entry points take our configs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmdet3d.apis import MonoDet3DInferencer, MultiModalityDet3DInferencer, init_model
from mmengine.config import Config

import mdp_mmdet3d.runner  # noqa: F401  lets checkpoints load safely

ROOT = Path(__file__).resolve().parents[2]
CONFIG, CHECKPOINT = ROOT / "configs/streampetr_mini.py", ROOT / "checkpoints/streampetr_mini.pth"


def by_init_model():
    return init_model(str(CONFIG), str(CHECKPOINT), device="cpu")


def by_inferencer():
    inferencer = MonoDet3DInferencer.__new__(MonoDet3DInferencer)  # its pipeline is for one camera and no stream
    return inferencer._init_model(Config.fromfile(CONFIG), str(CHECKPOINT))


@pytest.mark.parametrize("build", [by_init_model, by_inferencer])
def test_a_dense_model_is_built_with_its_weights(build) -> None:
    expected = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    found = build().state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in found.keys() & expected.keys())
    assert len(found.keys() & expected.keys()) > 100


@pytest.mark.parametrize(
    ("inferencer", "message"),
    [
        (MonoDet3DInferencer, "LoadImageFromFileMono3D is not found"),
        (MultiModalityDet3DInferencer, "Both LoadPointsFromFile and LoadImageFromFile must"),
    ],
)
def test_inferencers_build_the_model_and_end_where_the_faq_says(inferencer, message) -> None:
    """They read one image of one camera; docs/faq.md says what to do instead."""
    with pytest.raises(ValueError, match=message):
        inferencer(str(CONFIG), str(CHECKPOINT), device="cpu")
