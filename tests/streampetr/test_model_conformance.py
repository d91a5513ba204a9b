"""The detector against numbers recorded from the public implementation (shared data/streampetr_reference)."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from projects.streampetr.auxiliary_head import ImageTargets
from projects.streampetr.frame import FrameInputs
from projects.streampetr.memory import MemoryState, restart_streams

LOGITS_ATOL = 2e-4
METRES_ATOL = 1e-2
FIELDS = MemoryState._fields


@pytest.fixture(scope="module")
def model(build_reference):
    return build_reference()


@pytest.fixture(scope="module")
def inputs(rules) -> dict[str, np.ndarray]:
    return rules.make_inputs("tiny")


def frame_of(inputs: dict[str, np.ndarray], t: int) -> FrameInputs:
    return FrameInputs(
        pad_hw=inputs["img"].shape[-2:],
        intrinsics=torch.from_numpy(inputs["intrinsics"][t]),
        img2lidar=torch.linalg.inv(torch.from_numpy(inputs["lidar2img"][t]).double()).float(),
        ego_pose=torch.from_numpy(inputs["ego_pose"][t]),
        ego_pose_inv=torch.from_numpy(inputs["ego_pose_inv"][t]),
        timestamp=torch.from_numpy(inputs["timestamp"][t]),
        prev_exists=torch.from_numpy(inputs["prev_exists"][t]),
    )


def memory_of(recorded: dict[str, np.ndarray], t: int) -> MemoryState | None:
    if t < 0:
        return None
    return MemoryState(*(torch.from_numpy(recorded[f"f{t}/post_memory_{field}"]) for field in FIELDS))


@torch.no_grad()
def run(model, inputs, recorded, t: int):
    feats = model.extract_img_feat(torch.from_numpy(inputs["img"][t]))
    return model.run_frame(feats, frame_of(inputs, t), memory_of(recorded, t - 1))


def assert_close(actual, expected: np.ndarray, atol: float, rtol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, atol=atol, rtol=rtol)


@torch.no_grad()
def test_first_frame_intermediates(model, inputs, recorded) -> None:
    head, frame = model.pts_bbox_head, frame_of(inputs, 0)
    img_feats = model.extract_img_feat(torch.from_numpy(inputs["img"][0]))
    assert_close(img_feats, recorded["f0/img_feats"], 1e-4)
    pos_embed, cone = head.position_embedding(frame.pad_hw, frame.intrinsics, frame.img2lidar)
    assert_close(cone, recorded["f0/cone"], 1e-4)
    gated = head.embed_tokens(img_feats, pos_embed, cone)[1]
    assert_close(gated, recorded["f0/pos_embed"], 2e-3)
    memory = restart_streams(head.empty_memory(2), frame.prev_exists, head.pseudo_points)
    queries = head.align_queries(memory)
    assert_close(queries.tgt, recorded["f0/tgt"], 1e-4)
    assert_close(queries.query_pos, recorded["f0/query_pos"], 1e-4)
    assert_close(queries.reference_points, recorded["f0/reference_points"], 1e-6)


@pytest.mark.parametrize("t", range(4))
def test_frame_from_the_recorded_memory(model, inputs, recorded, t) -> None:
    output, memory = run(model, inputs, recorded, t)
    assert_close(output.all_cls_scores, recorded[f"f{t}/all_cls_scores"], LOGITS_ATOL)
    assert_close(output.all_bbox_preds, recorded[f"f{t}/all_bbox_preds"], METRES_ATOL)
    assert memory.timestamp.dtype == torch.float64
    for field, atol in zip(FIELDS, (2e-3, METRES_ATOL, 1e-6, 1e-3, 1e-3)):
        assert_close(getattr(memory, field), recorded[f"f{t}/post_memory_{field}"], atol)


@pytest.mark.parametrize("t", range(4))
def test_decoded_boxes(model, recorded, t) -> None:
    scores = torch.from_numpy(recorded[f"f{t}/all_cls_scores"][-1])
    boxes = torch.from_numpy(recorded[f"f{t}/all_bbox_preds"][-1])
    for b, found in enumerate(model.bbox_coder.decode(scores, boxes)):
        assert_close(found.bboxes, recorded[f"f{t}/dec{b}_bboxes"], 1e-4)
        assert_close(found.scores, recorded[f"f{t}/dec{b}_scores"], 1e-6)
        np.testing.assert_array_equal(found.labels, recorded[f"f{t}/dec{b}_labels"])


@pytest.mark.parametrize("mistake", [{"intrinsics_tiling": "camera_major"}, {"eps": 1e-4}], ids=str)
def test_options_are_not_interchangeable(build_reference, inputs, recorded, mistake) -> None:
    output, _ = run(build_reference(**mistake), inputs, recorded, 0)
    deviation = np.abs(output.all_cls_scores.numpy() - recorded["f0/all_cls_scores"]).max()
    assert deviation > 10 * LOGITS_ATOL


def test_float32_clock_is_visible(model, inputs, recorded) -> None:
    feats = model.extract_img_feat(torch.from_numpy(inputs["img"][1]))
    frame, memory = frame_of(inputs, 1), memory_of(recorded, 0)
    with torch.no_grad():
        output, _ = model.run_frame(
            feats,
            frame._replace(timestamp=frame.timestamp.float()),
            memory._replace(timestamp=memory.timestamp.float()),
        )
    assert np.abs(output.all_cls_scores.numpy() - recorded["f1/all_cls_scores"]).max() > 10 * LOGITS_ATOL


def ground_truth(rules: ModuleType, t: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    samples = rules.make_gt("tiny")[t]
    return (
        [torch.from_numpy(sample["boxes"]) for sample in samples],
        [torch.from_numpy(sample["labels"]) for sample in samples],
    )


def image_truth(rules: ModuleType, t: int) -> list[ImageTargets]:
    return [
        ImageTargets(*(torch.from_numpy(camera[key]) for key in ("bboxes", "labels", "centers")))
        for sample in rules.make_gt("tiny")[t]
        for camera in sample["cams"]
    ]


@pytest.fixture(scope="module")
def trained(build_reference, rules, inputs, recorded) -> SimpleNamespace:
    """Everything about the recorded training frame: evaluation mode stands for no dropout and no GridMask."""
    model = build_reference(auxiliary=True)
    boxes, labels = ground_truth(rules, 0)
    head = model.pts_bbox_head
    queries = model.denoising.generate(
        boxes,
        labels,
        num_classes=head.num_classes,
        pc_range=head.pc_range,
        num_queries=head.reference_points.num_embeddings + head.num_propagated,
        num_keys=head.reference_points.num_embeddings + head.memory_len,
        noise=torch.from_numpy(recorded["train_dn/t0/dn_rand"]) * 2 - 1,
    )
    feats = model.extract_img_feat(torch.from_numpy(inputs["img"][0]))
    output, _ = model.run_frame(feats, frame_of(inputs, 0), None, queries)
    losses = model.compute_losses(output, boxes, labels, queries)
    losses |= model.img_roi_head.loss(feats.flatten(0, 1), image_truth(rules, 0))
    sum(losses.values()).backward()
    auxiliary = model.img_roi_head(feats.flatten(0, 1))
    return SimpleNamespace(model=model, output=output, queries=queries, losses=losses, auxiliary=auxiliary)


def test_training_outputs(trained, recorded) -> None:
    prefix = "train_dn/t0/"
    pad = int(recorded[prefix + "dn_pad_size"])
    assert trained.queries.reference_points.shape[1] == pad
    np.testing.assert_array_equal(trained.queries.labels, recorded[prefix + "dn_labels"])
    found = {
        "dn_cls": trained.output.all_cls_scores[:, :, :pad],
        "dn_box": trained.output.all_bbox_preds[:, :, :pad],
        "all_cls_scores": trained.output.all_cls_scores[:, :, pad:],
        "all_bbox_preds": trained.output.all_bbox_preds[:, :, pad:],
    }
    for key, value in found.items():
        atol = METRES_ATOL if "box" in key else LOGITS_ATOL
        assert_close(value.detach(), recorded[prefix + key], atol)


def test_auxiliary_outputs(trained, recorded) -> None:
    names = {"cls_scores": "enc_cls_scores", "boxes": "enc_bbox_preds", "centers": "pred_centers2d",
             "centerness": "centerness"}  # fmt: skip
    for ours, theirs in names.items():
        assert_close(getattr(trained.auxiliary, ours).detach(), recorded[f"train_dn/t0/{theirs}"], 2e-4)


def test_training_losses(trained, recorded) -> None:
    prefix = "train_dn/t0/loss/"
    expected = {k.removeprefix(prefix): float(v) for k, v in recorded.items() if k.startswith(prefix)}
    total = expected.pop("TOTAL")
    assert set(trained.losses) == set(expected)
    for key, value in expected.items():
        assert trained.losses[key].item() == pytest.approx(value, rel=1e-4), key
    assert sum(trained.losses.values()).item() == pytest.approx(total, rel=1e-4)


def test_training_gradients(trained, recorded) -> None:
    prefix = "train_dn/t0/gradnorm/"
    norms = {k.removeprefix(prefix): float(v) for k, v in recorded.items() if k.startswith(prefix)}
    assert {name.split(".")[0] for name in norms} == {"img_backbone", "img_neck", "img_roi_head", "pts_bbox_head"}
    parameters = dict(trained.model.named_parameters())
    for key, value in norms.items():
        assert float(parameters[key].grad.norm()) == pytest.approx(value, rel=1e-4), key
