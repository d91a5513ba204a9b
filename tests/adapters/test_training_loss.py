"""Deformable DETR: its loss, which asks for the training mode of the detector alone, and its export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from mdp_mmdet3d.adapters import InputShape, TrainingLoss, adapter_of
from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.runtime.graph_manifest import GraphManifest
from mdp_mmdet3d.surgery.repair.weights import BACKGROUND

CONFIG = Path(__file__).resolve().parents[2] / "configs/deformable_detr/deformable-detr_r50_mdp.py"
SMALL = {
    "model.backbone.depth": 18,
    "model.neck.in_channels": [128, 256, 512],
    "model.encoder.num_layers": 1,
    "model.decoder.num_layers": 2,
    "model.num_queries": 20,
}


@pytest.mark.slow
def test_its_sizes_of_levels_are_constants_of_the_graph(tmp_path):
    adapter = adapter_of(read_config(CONFIG, SMALL), InputShape(0, 64, 64))
    model, _ = adapter.build(None)
    adapter.export(model, tmp_path / "out", plan_hash=None, weights="random")
    outputs = GraphManifest.load(tmp_path / "out").engines["model"].outputs
    assert [tuple(spec.shape) for spec in outputs[:2]] == [(2, 1, 20, 80), (2, 1, 20, 4)]


def test_the_loss_is_that_of_training_with_every_part_in_evaluation_mode():
    adapter = adapter_of(read_config(CONFIG, SMALL), InputShape(0, 64, 64))
    assert isinstance(adapter, TrainingLoss)
    model, _ = adapter.build(None)
    image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sample = DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1.0, 1.0)))
    sample.gt_instances = InstanceData(bboxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([3]))
    batch = dict(inputs=[image], data_samples=[sample])
    modes = []
    model.encoder.register_forward_hook(lambda module, *_: modes.append((module.training, model.training)))
    both, last = adapter.losses(model, batch), adapter.deployed_loss(model, batch)
    assert modes == [(False, True)] * 2 and not model.training
    assert 0 < float(last) < float(both)  # without the first decoder layer's
    torch.testing.assert_close(adapter.losses(model, batch), both)  # nothing is drawn
    both.backward()
    assert model.encoder.layers[0].self_attn.value_proj.weight.grad.abs().max() > 0


def test_its_queries_count_by_their_classes_in_repair(monkeypatch):
    adapter = adapter_of(read_config(CONFIG, SMALL), InputShape(0, 64, 64))
    model, _ = adapter.build(None)
    model.bbox_head.cls_branches[-1].bias.data.normal_()  # as a training leaves it: classes are told apart
    image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sample = DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), batch_input_shape=(64, 64)))
    monkeypatch.setattr(adapter, "calibration_batches", lambda *_: iter([dict(inputs=[image], data_samples=[sample])]))
    (frame,) = adapter.calibration_frames(model, 1)
    with torch.no_grad():
        scores = frame(model)[0][-1].sigmoid().amax(dim=-1)
    torch.testing.assert_close(frame.weights, scores + BACKGROUND)
    assert frame.weights.shape == (1, 20)
