"""Training frames that are not as they should be: no objects, NaN velocities, NaN images."""

from __future__ import annotations

import copy

import pytest
import torch
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.runner import Runner
from mmengine.structures import InstanceData

import mdp_mmdet3d.runner  # noqa: F401


@pytest.fixture
def trained(mini_config):
    """The mini detector in training mode and its first two batches (two streams)."""
    runner = Runner.from_cfg(mini_config)
    batches = iter(runner.train_dataloader)
    model = runner.model.train()
    return model, [model.data_preprocessor(next(batches), True) for _ in range(2)]


def without_objects(data: dict) -> dict:
    data = copy.deepcopy(data)
    for sample in data["data_samples"]:
        sample.gt_instances_3d = InstanceData(
            bboxes_3d=LiDARInstance3DBoxes(torch.zeros(0, 9), box_dim=9), labels_3d=torch.zeros(0, dtype=torch.long)
        )
        sample.gt_instances = sample.gt_instances[:0]
    return data


def gradients(model, losses: dict) -> dict[str, torch.Tensor | None]:
    model.zero_grad(set_to_none=True)
    model.parse_losses(losses)[0].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_a_frame_without_objects_reaches_every_parameter_and_logs_every_loss(trained) -> None:
    """Otherwise DDP would wait for the process that has none."""
    model, batches = trained
    usual = model(**batches[0], mode="loss")
    usual_gradients = gradients(model, usual)
    empty = model(**without_objects(batches[1]), mode="loss")
    assert empty.keys() == usual.keys()
    assert all(torch.isfinite(value).all() for value in empty.values())
    found = gradients(model, empty)
    assert {n for n, g in found.items() if g is None} <= {n for n, g in usual_gradients.items() if g is None}
    assert all(gradient.isfinite().all() for gradient in found.values() if gradient is not None)


def test_unknown_velocities_are_not_learned_but_harmless(trained) -> None:
    model, batches = trained
    for data in batches:
        for sample in data["data_samples"]:
            sample.gt_instances_3d.bboxes_3d.tensor[:, 7:] = float("nan")
        losses = model(**data, mode="loss")
        assert all(torch.isfinite(value).all() for value in losses.values())
        assert losses["loss_bbox"] == 0 and losses["loss_cls"] > 0
        assert all(g.isfinite().all() for g in gradients(model, losses).values() if g is not None)
        assert all(value.isfinite().all() for value in model.memory)


def test_a_damaged_image_does_not_poison_the_memory(trained) -> None:
    model, batches = trained
    model.eval().train()
    damaged = copy.deepcopy(batches[0])
    damaged["inputs"]["imgs"][0] = float("nan")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # statistics over the batch would carry the NaN into the other stream
    model(**damaged, mode="loss")
    assert all(value.isfinite().all() for value in model.memory)
    losses = model(**batches[1], mode="loss")
    assert all(torch.isfinite(value).all() for value in losses.values())
