"""The SSD of a shipped config predicts: MMDetection 3.3's own head ends in an AttributeError there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdp_mmdet3d.config_file import read_config

ROOT = Path(__file__).resolve().parents[2]


def test_scores_are_those_of_a_softmax_over_classes_and_background() -> None:
    pytest.importorskip("mmdet")
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.registry import init_default_scope

    config = read_config(ROOT / "configs/fashion_detection/ssd_mdp.py")
    init_default_scope("mmdet")
    torch.manual_seed(0)
    config.model.test_cfg.score_thr = 0.05
    model = MODELS.build(config.model).eval()
    images = torch.rand(1, 3, 128, 128)
    sample = DetDataSample(metainfo=dict(img_shape=(128, 128), ori_shape=(128, 128), scale_factor=(1.0, 1.0)))
    with torch.no_grad():
        found = model.predict(images, [sample])[0].pred_instances
        logits = model.bbox_head(model.neck(model.backbone(images)))[0]
    scores = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, 11) for level in logits]).softmax(-1)[:, :-1]
    assert len(found) > 0 and set(found.labels.tolist()) <= set(range(10))
    assert torch.allclose(found.scores.max(), scores.max())
