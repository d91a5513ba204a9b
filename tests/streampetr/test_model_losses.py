"""Box code, matching, losses and denoising queries."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from projects.streampetr.assigner import StreamPETRHungarianAssigner
from projects.streampetr.box_coder import StreamPETRBoxCoder, decode_boxes, encode_boxes
from projects.streampetr.denoising import DenoisingGenerator
from projects.streampetr.losses import StreamPETRLoss

CODE_WEIGHTS = torch.tensor([2.0, 2.0] + [1.0] * 8)
PC_RANGE = torch.tensor([-51.2, -51.2, -5.0, 51.2, 51.2, 3.0])
NUM_CLASSES, NUM_QUERIES = 10, 20


def random_boxes(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n, 9, generator=generator)
    low = torch.tensor([-45.0, -45, -3, 0.5, 0.5, 0.5, -3.1, -5, -5])
    high = torch.tensor([45.0, 45, 1, 3, 9, 3, 3.1, 5, 5])
    return low + uniform * (high - low)


@given(
    centre=st.tuples(*[st.floats(-60, 60)] * 3),
    size=st.tuples(*[st.floats(0.1, 20)] * 3),
    yaw=st.floats(-3.1, 3.1),
    velocity=st.tuples(*[st.floats(-30, 30)] * 2),
)
def test_box_code_round_trip(centre, size, yaw, velocity) -> None:
    box = torch.tensor([[*centre, *size, yaw, *velocity]], dtype=torch.float64)
    torch.testing.assert_close(decode_boxes(encode_boxes(box)), box)


def test_decoding_takes_the_best_pairs_inside_the_range() -> None:
    boxes = random_boxes(3)
    boxes[1, 0] = 70.0
    logits = torch.full((3, NUM_CLASSES), -9.0)
    logits[0, 4], logits[0, 7], logits[1, 2], logits[2, 9] = 1.0, 3.0, 5.0, 2.0
    codes = encode_boxes(boxes)
    (found,) = StreamPETRBoxCoder(max_num=4).decode(logits[None], codes[None])
    assert found.labels.tolist() == [7, 9, 4]
    torch.testing.assert_close(found.bboxes, boxes[[0, 2, 0]])
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    (confident,) = StreamPETRBoxCoder(max_num=4, score_threshold=0.85).decode(logits[None], codes[None])
    assert confident.labels.tolist() == [7, 9]


def test_more_detections_than_pairs_is_not_an_error() -> None:
    (found,) = StreamPETRBoxCoder(max_num=1000).decode(torch.zeros(1, 2, 3), encode_boxes(random_boxes(2))[None])
    assert len(found.scores) == 6


def test_assignment_has_the_smallest_total_cost() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5, NUM_CLASSES, generator=generator)
    codes, gt = encode_boxes(random_boxes(5, 1)), encode_boxes(random_boxes(3, 2))
    labels = torch.tensor([1, 4, 4])
    assigner = StreamPETRHungarianAssigner()
    p = logits.sigmoid().double()
    focal = -0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log()
    l1 = ((codes[:, None] - gt[None]).abs() * CODE_WEIGHTS)[..., :8].sum(-1)
    cost = (2.0 * focal[:, labels] + 0.25 * l1).numpy()
    rows, columns = assigner.assign(logits, codes, labels, gt, CODE_WEIGHTS)
    best = min(sum(cost[q, g] for g, q in enumerate(chosen)) for chosen in permutations(range(5), 3))
    assert cost[rows, columns].sum() == pytest.approx(best)
    assert sorted(columns.tolist()) == [0, 1, 2]


def test_velocity_does_not_take_part_in_the_matching() -> None:
    gt = encode_boxes(random_boxes(2, 3))
    codes = gt.clone()
    codes[:, 8:] = gt[:, 8:].flip(0) * 100
    rows, columns = StreamPETRHungarianAssigner().assign(
        torch.zeros(2, NUM_CLASSES), codes, torch.tensor([0, 0]), gt, CODE_WEIGHTS
    )
    assert rows.tolist() == columns.tolist()


def predictions(gt: torch.Tensor, labels: torch.Tensor, levels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of which the first ones hit the ground truth exactly."""
    boxes = encode_boxes(random_boxes(NUM_QUERIES, 7))
    boxes[: len(gt)] = encode_boxes(gt)
    scores = torch.full((NUM_QUERIES, NUM_CLASSES), -12.0)
    scores[torch.arange(len(gt)), labels] = 12.0
    return scores.expand(levels, 1, -1, -1).clone(), boxes.expand(levels, 1, -1, -1).clone()


def losses_of(scores, boxes, gt, labels) -> dict[str, torch.Tensor]:
    return StreamPETRLoss()(scores, boxes, [gt], [labels], CODE_WEIGHTS, CODE_WEIGHTS)


def test_perfect_predictions_cost_nothing() -> None:
    gt, labels = random_boxes(4), torch.tensor([0, 3, 9, 3])
    losses = losses_of(*predictions(gt, labels), gt, labels)
    assert set(losses) == {"loss_cls", "loss_bbox", "d0.loss_cls", "d0.loss_bbox"}
    assert all(float(value) < 1e-5 for value in losses.values())


def test_order_of_the_ground_truth_does_not_matter() -> None:
    gt, labels = random_boxes(4), torch.tensor([0, 3, 9, 3])
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(2, 1, NUM_QUERIES, NUM_CLASSES, generator=generator)
    boxes = encode_boxes(random_boxes(NUM_QUERIES, 9)).expand(2, 1, -1, -1)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(losses_of(scores, boxes, gt, labels), losses_of(scores, boxes, gt[order], labels[order]))


def test_boxes_with_unknown_velocity_are_matched_but_not_regressed() -> None:
    gt, labels = random_boxes(2), torch.tensor([0, 3])
    scores, boxes = predictions(gt, labels, levels=1)
    boxes[..., 0] += 1.0
    complete = losses_of(scores, boxes, gt, labels)
    gt[1, 7:] = float("nan")
    partial = losses_of(scores, boxes, gt, labels)
    assert float(complete["loss_bbox"]) == pytest.approx(2 * 2.0 * 0.25 / 2, rel=1e-5)
    assert float(partial["loss_bbox"]) == pytest.approx(float(complete["loss_bbox"]) / 2, rel=1e-5)
    assert float(partial["loss_cls"]) == pytest.approx(float(complete["loss_cls"]), rel=1e-5)


def test_frame_without_objects_trains_the_background_only() -> None:
    scores = torch.zeros(1, 1, NUM_QUERIES, NUM_CLASSES, requires_grad=True)
    boxes = torch.zeros(1, 1, NUM_QUERIES, 10, requires_grad=True)
    losses = losses_of(scores, boxes, torch.zeros(0, 9), torch.zeros(0, dtype=torch.long))
    sum(losses.values()).backward()
    assert losses["loss_bbox"].item() == 0.0
    assert (scores.grad > 0).all()
    assert not boxes.grad.any()


def generate(counts: list[int], groups: int = 3, **kwargs):
    boxes = [random_boxes(n, seed) for seed, n in enumerate(counts)]
    labels = [torch.arange(n) for n in counts]
    generator = DenoisingGenerator(groups=groups, **kwargs)
    queries = generator.generate(boxes, labels, num_classes=NUM_CLASSES, pc_range=PC_RANGE, num_queries=5, num_keys=7)
    return queries, boxes, labels


def test_denoising_centres_stay_inside_their_boxes() -> None:
    torch.manual_seed(0)
    queries, _, _ = generate([2, 5])
    points = queries.reference_points[queries.sample_index, queries.slot_index]
    metres = points * (PC_RANGE[3:] - PC_RANGE[:3]) + PC_RANGE[:3]
    offset = (metres - queries.boxes[:, :3]).abs() / (queries.boxes[:, 3:6] / 2)
    assert (offset <= 1.001).all()
    background = queries.labels == NUM_CLASSES
    # Rounding near the sphere's surface is left out.
    assert (offset[background].norm(dim=1) > 0.749).all()
    assert (offset[~background].norm(dim=1) < 0.751).all()
    assert background.any() and not background.all()


def test_denoising_slots_are_those_of_sample_and_group() -> None:
    queries, boxes, _ = generate([2, 5])
    assert queries.reference_points.shape == (2, 15, 3)
    for sample, slot, box in zip(queries.sample_index, queries.slot_index, queries.boxes):
        torch.testing.assert_close(box, boxes[sample][slot % 5])
    used = {(int(b), int(s)) for b, s in zip(queries.sample_index, queries.slot_index)}
    assert len(used) == 3 * 7
    assert queries.expected_positives == pytest.approx(21 * np.pi / 6 * 0.75**3)


def test_denoising_groups_are_hidden_from_each_other_and_from_the_rest() -> None:
    queries, _, _ = generate([2, 5])
    blocked = queries.self_attn_mask
    assert blocked.shape == (15 + 5, 15 + 7)
    group = torch.arange(15) // 5
    torch.testing.assert_close(blocked[:15, :15], group[:, None] != group[None])
    assert blocked[15:, :15].all()
    assert not blocked[:, 15:].any()


def test_without_ground_truth_there_is_nothing_to_denoise() -> None:
    assert generate([0, 0])[0] is None
    queries, _, _ = generate([0, 2])
    assert queries.sample_index.unique().tolist() == [1]
