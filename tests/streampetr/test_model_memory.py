"""Semantics of the memory queue."""

from __future__ import annotations

import pytest
import torch

from projects.streampetr.memory import (
    MemoryState,
    empty_memory,
    post_update,
    pre_update,
    push_detections,
    restart_streams,
    transform_memory,
    truncate_memory,
)

LENGTH, TOPK, PSEUDO, CHANNELS = 12, 4, 3, 8
EPOCH_S = 1533151603.547590


def pose(x: float, y: float, yaw: float) -> torch.Tensor:
    yaw_tensor = torch.tensor(yaw, dtype=torch.float64)
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[yaw_tensor.cos(), -yaw_tensor.sin()], [yaw_tensor.sin(), yaw_tensor.cos()]])
    matrix[:2, 3] = torch.tensor([x, y], dtype=torch.float64)
    return matrix.unsqueeze(0)


def random_memory(batch: int = 1, rows: int = LENGTH + TOPK, dtype: torch.dtype = torch.float64) -> MemoryState:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, rows, *shape, generator=generator, dtype=dtype)

    return MemoryState(draw(CHANNELS), draw(3) * 20, draw(1).double(), draw(4, 4), draw(2))


PSEUDO_POINTS = torch.arange(PSEUDO * 3, dtype=torch.float64).reshape(PSEUDO, 3)


def test_storing_and_recalling_at_the_same_place_and_time_is_the_identity() -> None:
    memory = random_memory(rows=LENGTH)
    here, now = pose(411.0, 1180.0, 0.7), torch.tensor([EPOCH_S], dtype=torch.float64)
    stored = post_update(memory, timestamp=now, ego_pose=here)
    recalled = pre_update(
        stored,
        length=LENGTH,
        timestamp=now,
        ego_pose_inv=torch.linalg.inv(here),
        prev_exists=torch.ones(1),
        pseudo_points=PSEUDO_POINTS,
    )
    # The clock keeps the microseconds of an epoch time in float64.
    torch.testing.assert_close(recalled, memory, atol=1e-6, rtol=0)


def test_a_static_point_follows_ego_motion_and_ages() -> None:
    first, second = pose(10.0, 5.0, 0.3), pose(12.0, 5.5, 0.4)
    times = torch.tensor([EPOCH_S, EPOCH_S + 0.513], dtype=torch.float64)
    memory = random_memory(rows=LENGTH)._replace(timestamp=torch.zeros(1, LENGTH, 1, dtype=torch.float64))
    stored = post_update(memory, timestamp=times[:1], ego_pose=first)
    recalled = pre_update(
        stored,
        length=LENGTH,
        timestamp=times[1:],
        ego_pose_inv=torch.linalg.inv(second),
        prev_exists=torch.ones(1),
        pseudo_points=PSEUDO_POINTS,
    )
    relative = torch.linalg.inv(second) @ first
    homogeneous = torch.cat((memory.reference_point, torch.ones(1, LENGTH, 1, dtype=torch.float64)), dim=-1)
    expected = (homogeneous @ relative.transpose(-1, -2))[..., :3]
    torch.testing.assert_close(recalled.reference_point, expected)
    torch.testing.assert_close(recalled.egopose, relative[:, None] @ memory.egopose)
    torch.testing.assert_close(recalled.timestamp, torch.full_like(recalled.timestamp, 0.513), atol=1e-6, rtol=0)
    torch.testing.assert_close(recalled.velo, memory.velo)


def test_a_restarted_stream_holds_pseudo_points_and_unmasked_zeros() -> None:
    restarted = restart_streams(truncate_memory(random_memory(), LENGTH), torch.zeros(1), PSEUDO_POINTS)
    torch.testing.assert_close(restarted.reference_point[0, :PSEUDO], PSEUDO_POINTS)
    torch.testing.assert_close(restarted.egopose[0, :PSEUDO], torch.eye(4, dtype=torch.float64).expand(PSEUDO, 4, 4))
    assert not restarted.reference_point[0, PSEUDO:].any()
    assert not restarted.egopose[0, PSEUDO:].any()
    assert not any(value.any() for value in (restarted.embedding, restarted.timestamp, restarted.velo))


def test_streams_of_a_batch_restart_independently() -> None:
    memory = truncate_memory(random_memory(batch=2), LENGTH)
    mixed = restart_streams(memory, torch.tensor([1.0, 0.0]), PSEUDO_POINTS)
    for value, before in zip(mixed, memory):
        torch.testing.assert_close(value[0], before[0])
    alone = restart_streams(memory, torch.zeros(2), PSEUDO_POINTS)
    for value, expected in zip(mixed, alone):
        torch.testing.assert_close(value[1], expected[1])


def test_a_restart_forgets_non_finite_rows() -> None:
    broken = MemoryState(*(torch.full_like(v, float("nan")) for v in truncate_memory(random_memory(), LENGTH)))
    assert all(value.isfinite().all() for value in restart_streams(broken, torch.zeros(1), PSEUDO_POINTS))


def test_the_best_queries_are_prepended_detached_and_new() -> None:
    memory = truncate_memory(random_memory(), LENGTH)
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.8, 0.2, 0.7]], dtype=torch.float64)
    embedding = torch.randn(1, 6, CHANNELS, dtype=torch.float64, requires_grad=True)
    boxes = torch.randn(1, 6, 10, dtype=torch.float64, requires_grad=True)
    grown = push_detections(memory, scores, embedding, boxes, TOPK)
    best = [1, 3, 5, 2]
    torch.testing.assert_close(grown.embedding[0, :TOPK], embedding.detach()[0, best])
    torch.testing.assert_close(grown.reference_point[0, :TOPK], boxes.detach()[0, best, :3])
    torch.testing.assert_close(grown.velo[0, :TOPK], boxes.detach()[0, best, 8:])
    torch.testing.assert_close(grown.egopose[0, :TOPK], torch.eye(4, dtype=torch.float64).expand(TOPK, 4, 4))
    assert not grown.timestamp[0, :TOPK].any()
    assert not any(value.requires_grad for value in grown)
    for value, before in zip(grown, memory):
        torch.testing.assert_close(value[:, TOPK:], before)


def test_dummy_rows_travel_on_as_the_former_origin() -> None:
    """After a restart the zero rows are stored at the vehicle's place and get a real age later."""
    memory = restart_streams(empty_memory(1, LENGTH, CHANNELS, PSEUDO_POINTS), torch.zeros(1), PSEUDO_POINTS)
    here = pose(3.0, 4.0, 0.5)
    stored = post_update(memory, timestamp=torch.tensor([100.0], dtype=torch.float64), ego_pose=here)
    torch.testing.assert_close(stored.reference_point[0, -1], here[0, :3, 3])
    assert not stored.egopose[0, -1].any()
    assert float(stored.timestamp[0, -1]) == -100.0


@pytest.mark.parametrize("rows", [LENGTH, LENGTH + TOPK])
def test_recall_keeps_the_newest_rows(rows: int) -> None:
    memory = random_memory(rows=rows)
    recalled = pre_update(
        memory,
        length=LENGTH,
        timestamp=torch.zeros(1, dtype=torch.float64),
        ego_pose_inv=torch.eye(4, dtype=torch.float64).unsqueeze(0),
        prev_exists=torch.ones(1),
        pseudo_points=PSEUDO_POINTS,
    )
    for value, before in zip(recalled, memory):
        torch.testing.assert_close(value, before[:, :LENGTH])


def test_transform_composes() -> None:
    memory, a, b = random_memory(), pose(1.0, 2.0, 0.1), pose(-3.0, 0.5, 1.1)
    torch.testing.assert_close(transform_memory(transform_memory(memory, a), b), transform_memory(memory, b @ a))
