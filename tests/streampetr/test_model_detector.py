"""The detector in MMDetection3D's terms: data samples, streaming state, modes, preprocessing."""

from __future__ import annotations

import pytest
import torch
from mmengine.structures import InstanceData
from torch import nn

from projects.streampetr.box_coder import Detections
from projects.streampetr.detector import to_instances
from projects.streampetr.frame import frame_inputs

from ..numerics import assert_close, assert_decided, assert_same_rows


@torch.no_grad()
def raw(model, images, *samples) -> torch.Tensor:
    return model({"imgs": images}, list(samples), mode="tensor")["all_cls_scores"]


def test_predictions_are_bottom_centred_boxes(build_small, make_sample, make_images) -> None:
    model = build_small()
    with torch.no_grad():
        (sample,) = model({"imgs": make_images()}, [make_sample()], mode="predict")
    found = sample.pred_instances_3d
    assert found.bboxes_3d.tensor.shape == (len(found), 9)
    assert len(found.scores_3d) == len(found.labels_3d) == len(found) > 0
    box = torch.tensor([[1.0, 2.0, 0.5, 4.0, 2.0, 1.6, 0.3, 1.0, 0.0]])
    boxes = to_instances(Detections(box, torch.ones(1), torch.zeros(1, dtype=torch.long))).bboxes_3d
    torch.testing.assert_close(boxes.gravity_center, box[:, :3])
    assert float(boxes.tensor[0, 2]) == pytest.approx(0.5 - 0.8)


@pytest.mark.parametrize("change", [{"scene_token": "scene-b"}, {"prev_exists": False}], ids=str)
def test_a_new_stream_starts_as_after_a_reset(build_small, make_sample, make_images, change: dict) -> None:
    model = build_small()
    raw(model, make_images(0), make_sample(0))
    continued = raw(model, make_images(1), make_sample(1))
    model.reset_memory()
    fresh = raw(model, make_images(1), make_sample(1))
    assert not torch.allclose(continued, fresh, atol=1e-3)
    model.reset_memory()
    raw(model, make_images(0), make_sample(0))
    torch.testing.assert_close(raw(model, make_images(1), make_sample(1, **change)), fresh)


@pytest.mark.numerics
def test_streams_of_a_batch_do_not_mix(build_small, make_sample, make_images) -> None:
    model = build_small()
    alone = []
    for offset in (0, 10):
        model.reset_memory()
        alone.append([raw(model, make_images(offset + t), make_sample(t)) for t in range(2)])
    model.reset_memory()
    for t in range(2):
        images = torch.cat((make_images(t), make_images(10 + t)))
        together = raw(model, images, make_sample(t), make_sample(t, scene_token="scene-a"))
        for b in range(2):
            ours, theirs = (values.transpose(0, 1).flatten(1) for values in (together[:, b], alone[b][t][:, 0]))
            assert_decided(together[-1, b], alone[b][t][-1, 0], [16], aligned=60)
            assert_close(ours[:60], theirs[:60])
            # Propagated queries are in the order of scores that may nearly tie.
            assert_same_rows(ours[60:], theirs[60:])


def test_switching_between_training_and_evaluation_clears_the_memory(build_small, make_sample, make_images) -> None:
    model = build_small()
    raw(model, make_images(), make_sample())
    assert model.memory is not None
    assert model.eval() is model and model.memory is not None
    assert model.train() is model and model.memory is None


def test_streaming_state_is_not_in_the_state_dict(build_small, make_sample, make_images) -> None:
    model = build_small()
    before = set(model.state_dict()), set(dict(model.named_buffers()))
    raw(model, make_images(), make_sample())
    assert (set(model.state_dict()), set(dict(model.named_buffers()))) == before


def test_batch_norm_is_frozen_from_the_start(build_small) -> None:
    model = build_small()
    for _ in range(2):
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        assert norms and not any(norm.training for norm in norms)
        assert not any(parameter.requires_grad for norm in norms for parameter in norm.parameters())
        model.train()


def test_training_reaches_every_parameter(build_small, make_sample, make_images) -> None:
    model = build_small().train()
    losses = model({"imgs": make_images()}, [make_sample()], mode="loss")
    assert {"loss_cls", "d1.loss_bbox", "dn_loss_cls", "d0.dn_loss_bbox"} <= set(losses)
    sum(losses.values()).backward()
    # The memory is detached, so the next frame has a graph of its own; only there it holds embeddings.
    sum(model({"imgs": make_images(1)}, [make_sample(1)], mode="loss").values()).backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle
    assert model.pts_bbox_head.pseudo_reference_points.weight.grad is None


def test_evaluation_losses_are_reproducible(build_small, make_sample, make_images) -> None:
    model = build_small()
    first = model({"imgs": make_images()}, [make_sample()], mode="loss")
    model.reset_memory()
    second = model({"imgs": make_images()}, [make_sample()], mode="loss")
    torch.testing.assert_close(first, second)
    assert not any("dn_" in key for key in first)


def test_a_frame_without_objects_has_the_same_loss_keys(build_small, make_sample, make_images) -> None:
    model = build_small().train()
    full = model({"imgs": make_images()}, [make_sample()], mode="loss")
    empty = make_sample(1)
    boxes = empty.gt_instances_3d.bboxes_3d
    empty.gt_instances_3d = InstanceData(
        bboxes_3d=boxes.new_box(torch.zeros(0, 9)), labels_3d=torch.zeros(0, dtype=torch.long)
    )
    losses = model({"imgs": make_images(1)}, [empty], mode="loss")
    assert set(losses) == set(full)
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()


def test_clock_stays_float64(make_sample, make_images) -> None:
    frame = frame_inputs([make_sample(1)], make_images())
    assert frame.timestamp.dtype == torch.float64
    assert float(frame.timestamp) == 1533151604.0


@pytest.mark.parametrize("key", ["intrinsics", "lidar2img", "ego_pose", "timestamp", "prev_exists", "scene_token"])
def test_missing_metainfo_is_named(build_small, make_sample, make_images, key: str) -> None:
    with pytest.raises(ValueError, match=f"data sample 0 lacks metainfo '{key}'"):
        raw(build_small(), make_images(), make_sample(**{key: None}))


def test_batch_size_must_not_change_within_streams(build_small, make_sample, make_images) -> None:
    model = build_small()
    model({"imgs": make_images(0, batch=2)}, [make_sample(0), make_sample(0)], mode="loss")
    with pytest.raises(ValueError, match="memory holds 2 streams but the batch has 1"):
        model({"imgs": make_images(1)}, [make_sample(1)], mode="loss")


def test_images_and_samples_must_agree(build_small, make_sample, make_images) -> None:
    model = build_small()
    with pytest.raises(ValueError, match="1 samples of images came with 2 data samples"):
        raw(model, make_images(), make_sample(), make_sample())
    with pytest.raises(ValueError, match="'lidar2img' is for 6 cameras, the images are 5"):
        raw(model, make_images()[:, :5], make_sample())


def test_loss_without_criterion_is_refused(build_small, make_sample, make_images) -> None:
    model = build_small()
    model.criterion = None
    with pytest.raises(ValueError, match="has no losses"):
        model({"imgs": make_images()}, [make_sample()], mode="loss")


def test_preprocessing_swaps_channels_normalises_and_pads(build_small, make_sample) -> None:
    model = build_small()
    bgr = torch.randint(0, 256, (6, 3, 60, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = model.data_preprocessor({"inputs": {"img": [bgr, bgr]}, "data_samples": [make_sample(), make_sample()]})
    images = batch["inputs"]["imgs"]
    assert images.shape == (2, 6, 3, 64, 96) and images.dtype == torch.float32
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    torch.testing.assert_close(images[0, 2, :, :60], (bgr[2].flip(0).float() - mean) / std)
    assert not images[..., 60:, :].any()
