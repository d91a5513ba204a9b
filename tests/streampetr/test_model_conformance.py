"""The detector against numbers recorded from the public implementation (tests/data/streampetr_reference)."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from projects.streampetr.auxiliary_head import ImageTargets
from projects.streampetr.frame import FrameInputs
from projects.streampetr.memory import MemoryState, restart_streams

from ..numerics import COLUMNS, GEOMETRY, LAYER, array, assert_close, assert_differs, assert_same_memory, pair_rows

pytestmark = pytest.mark.numerics
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


@torch.no_grad()
def test_first_frame_intermediates(model, inputs, recorded) -> None:
    head, frame = model.pts_bbox_head, frame_of(inputs, 0)
    img_feats = model.extract_img_feat(torch.from_numpy(inputs["img"][0]))
    assert_close(img_feats, recorded["f0/img_feats"])
    pos_embed, cone = head.position_embedding(frame.pad_hw, frame.intrinsics, frame.img2lidar)
    assert_close(cone, recorded["f0/cone"], GEOMETRY)
    gated = head.embed_tokens(img_feats, pos_embed, cone)[1]
    assert_close(gated, recorded["f0/pos_embed"])
    memory = restart_streams(head.empty_memory(2), frame.prev_exists, head.pseudo_points)
    queries = head.align_queries(memory)
    assert_close(queries.tgt, recorded["f0/tgt"], LAYER)
    assert_close(queries.query_pos, recorded["f0/query_pos"], LAYER)
    assert_close(queries.reference_points, recorded["f0/reference_points"], GEOMETRY)


@pytest.mark.parametrize("t", range(4))
def test_frame_from_the_recorded_memory(model, inputs, recorded, t) -> None:
    output, memory = run(model, inputs, recorded, t)
    logits = recorded[f"f{t}/all_cls_scores"]
    assert_close(output.all_cls_scores, logits)
    assert_close(output.all_bbox_preds, recorded[f"f{t}/all_bbox_preds"], COLUMNS, columns=True)
    assert memory.timestamp.dtype == torch.float64
    topk = model.pts_bbox_head.topk_proposals
    assert_same_memory(memory, memory_of(recorded, t), output.all_cls_scores[-1], logits[-1], topk)


@pytest.mark.parametrize("t", range(4))
def test_decoded_boxes(model, recorded, t) -> None:
    scores = torch.from_numpy(recorded[f"f{t}/all_cls_scores"][-1])
    boxes = torch.from_numpy(recorded[f"f{t}/all_bbox_preds"][-1])
    for b, found in enumerate(model.bbox_coder.decode(scores, boxes)):
        bboxes, ranked, labels = (recorded[f"f{t}/dec{b}_{name}"] for name in ("bboxes", "scores", "labels"))
        assert_close(found.scores, ranked, GEOMETRY)
        # Equal probabilities come in any order.
        rows = [
            np.column_stack([array(x), 1e3 * array(y)]) for x, y in ((found.bboxes, found.labels), (bboxes, labels))
        ]
        order, choices = pair_rows(*rows, array(ranked), margin=4 * float(np.finfo(np.float32).eps))
        assert_close(found.bboxes, bboxes[order], GEOMETRY, columns=True)
        np.testing.assert_array_equal(found.labels, labels[order])
        assert (choices > 1).mean() < 0.2


@pytest.mark.parametrize("mistake", [{"intrinsics_tiling": "camera_major"}, {"eps": 1e-4}], ids=str)
def test_options_are_not_interchangeable(build_reference, inputs, recorded, mistake) -> None:
    output, _ = run(build_reference(**mistake), inputs, recorded, 0)
    assert_differs(output.all_cls_scores, recorded["f0/all_cls_scores"])


def test_float32_clock_is_visible(model, inputs, recorded) -> None:
    feats = model.extract_img_feat(torch.from_numpy(inputs["img"][1]))
    frame, memory = frame_of(inputs, 1), memory_of(recorded, 0)
    with torch.no_grad():
        output, _ = model.run_frame(
            feats,
            frame._replace(timestamp=frame.timestamp.float()),
            memory._replace(timestamp=memory.timestamp.float()),
        )
    assert_differs(output.all_cls_scores, recorded["f1/all_cls_scores"])


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
        scale = dict(limit=COLUMNS, columns=True) if "box" in key else {}
        assert_close(value, recorded[prefix + key], **scale, what=key)


def test_auxiliary_outputs(trained, recorded) -> None:
    names = {"cls_scores": "enc_cls_scores", "boxes": "enc_bbox_preds", "centers": "pred_centers2d",
             "centerness": "centerness"}  # fmt: skip
    for ours, theirs in names.items():
        assert_close(getattr(trained.auxiliary, ours), recorded[f"train_dn/t0/{theirs}"], what=ours)


def test_training_losses(trained, recorded) -> None:
    prefix = "train_dn/t0/loss/"
    expected = {k.removeprefix(prefix): float(v) for k, v in recorded.items() if k.startswith(prefix)}
    total = expected.pop("TOTAL")
    assert set(trained.losses) == set(expected)
    for key, value in expected.items():
        assert_close(trained.losses[key], value, what=key)
    assert_close(sum(trained.losses.values()), total)


def test_training_gradients(trained, recorded) -> None:
    prefix = "train_dn/t0/gradnorm/"
    norms = {k.removeprefix(prefix): float(v) for k, v in recorded.items() if k.startswith(prefix)}
    assert {name.split(".")[0] for name in norms} == {"img_backbone", "img_neck", "img_roi_head", "pts_bbox_head"}
    parameters = dict(trained.model.named_parameters())
    for key, value in norms.items():
        assert_close(parameters[key].grad.norm(), value, what=key)
