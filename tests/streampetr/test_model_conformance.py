"""The detector against numbers recorded from the public implementation (shared data/streampetr_reference)."""
from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

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


def training_frame(model, rules, inputs, recorded):
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
    return output, boxes, labels, queries


def test_training_frame(model, rules, inputs, recorded) -> None:
    prefix = "train_dn/t0/"
    model.zero_grad()
    output, boxes, labels, queries = training_frame(model, rules, inputs, recorded)
    pad = int(recorded[prefix + "dn_pad_size"])
    assert queries.reference_points.shape[1] == pad
    np.testing.assert_array_equal(queries.labels, recorded[prefix + "dn_labels"])
    found = {
        "dn_cls": output.all_cls_scores[:, :, :pad],
        "dn_box": output.all_bbox_preds[:, :, :pad],
        "all_cls_scores": output.all_cls_scores[:, :, pad:],
        "all_bbox_preds": output.all_bbox_preds[:, :, pad:],
    }
    for key, value in found.items():
        atol = METRES_ATOL if "box" in key else LOGITS_ATOL
        assert_close(value.detach(), recorded[prefix + key], atol)

    losses = model.compute_losses(output, boxes, labels, queries)
    expected = {
        key.removeprefix(prefix + "loss/"): float(value)
        for key, value in recorded.items()
        if key.startswith(prefix + "loss/") and key.endswith(("loss_cls", "loss_bbox")) and "enc_" not in key
    }
    assert set(losses) == set(expected)
    for key, value in expected.items():
        assert float(losses[key]) == pytest.approx(value, rel=1e-4), key

    # Gradients of the image branch include the auxiliary head's share and cannot be compared.
    sum(losses.values()).backward()
    norms = {
        key.removeprefix(prefix + "gradnorm/"): float(value)
        for key, value in recorded.items()
        if key.startswith(prefix + "gradnorm/pts_bbox_head")
    }
    assert norms
    parameters = dict(model.named_parameters())
    for key, value in norms.items():
        assert float(parameters[key].grad.norm()) == pytest.approx(value, rel=2e-3), key
