"""The memory queue of past object queries, as a value and pure functions on it.

Between frames the rows live in the global frame with negative absolute times; inside a frame they live in the
current lidar frame with ages in seconds. Rows are ordered newest first. Source: StreamPETR, arXiv 2303.11926,
section 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MemoryState(NamedTuple):
    """Past object queries of a batch of streams.

    Attributes:
        embedding: (B, n, C) query features.
        reference_point: (B, n, 3) centres in metres.
        timestamp: (B, n, 1) seconds, float64 while streaming in PyTorch.
        egopose: (B, n, 4, 4) transform from the lidar frame of the row's time.
        velo: (B, n, 2) metres per second in the lidar frame of the row's time.
    """

    embedding: Tensor
    reference_point: Tensor
    timestamp: Tensor
    egopose: Tensor
    velo: Tensor


def empty_memory(batch_size: int, length: int, embed_dims: int, like: Tensor) -> MemoryState:
    """A queue of zeros, on the device and in the type of ``like`` (timestamps in float64)."""
    return MemoryState(
        embedding=like.new_zeros(batch_size, length, embed_dims),
        reference_point=like.new_zeros(batch_size, length, 3),
        timestamp=like.new_zeros(batch_size, length, 1, dtype=torch.float64),
        egopose=like.new_zeros(batch_size, length, 4, 4),
        velo=like.new_zeros(batch_size, length, 2),
    )


def transform_memory(memory: MemoryState, matrix: Tensor) -> MemoryState:
    """Move points and poses by ``matrix`` (B, 4, 4); objects count as static, velocities are not rotated."""
    points = memory.reference_point @ matrix[:, :3, :3].transpose(-1, -2) + matrix[:, None, :3, 3]
    return memory._replace(reference_point=points, egopose=matrix[:, None] @ memory.egopose)


def truncate_memory(memory: MemoryState, length: int) -> MemoryState:
    """The newest ``length`` rows."""
    return MemoryState(*(value[:, :length] for value in memory))


def restart_streams(memory: MemoryState, prev_exists: Tensor, pseudo_points: Tensor) -> MemoryState:
    """Clear the rows of streams that start anew and seed them with the pseudo points.

    Args:
        memory: In the current lidar frame.
        prev_exists: (B,) 1 where the stream goes on, 0 where it starts.
        pseudo_points: (P, 3) metres; become the first P rows of a starting stream, with identity pose. Its
            other rows are zero; nothing masks them (the checkpoints were trained with that).
    """
    goes_on = prev_exists.reshape(-1, 1, 1) > 0
    num_pseudo, rest = pseudo_points.shape[0], memory.embedding.shape[1] - pseudo_points.shape[0]
    points = torch.cat((pseudo_points, pseudo_points.new_zeros(rest, 3)))
    identity = torch.eye(4, dtype=pseudo_points.dtype, device=pseudo_points.device)
    poses = torch.cat((identity.expand(num_pseudo, 4, 4), identity.new_zeros(rest, 4, 4)))

    def select(value: Tensor, start: Tensor) -> Tensor:
        return torch.where(goes_on if value.dim() == 3 else goes_on[..., None], value, start)

    return MemoryState(
        embedding=select(memory.embedding, torch.zeros_like(memory.embedding)),
        reference_point=select(memory.reference_point, points),
        timestamp=select(memory.timestamp, torch.zeros_like(memory.timestamp)),
        egopose=select(memory.egopose, poses),
        velo=select(memory.velo, torch.zeros_like(memory.velo)),
    )


def pre_update(
    memory: MemoryState,
    *,
    length: int,
    timestamp: Tensor,
    ego_pose_inv: Tensor,
    prev_exists: Tensor,
    pseudo_points: Tensor,
) -> MemoryState:
    """Bring the stored queue into the current frame.

    Args:
        memory: As :func:`post_update` returned it (global frame, at least ``length`` rows).
        length: Rows to keep.
        timestamp: (B,) absolute seconds, float64.
        ego_pose_inv: (B, 4, 4) global to current lidar frame.
        prev_exists: (B,) 1 where the stream goes on, 0 where it starts.
        pseudo_points: (P, 3) metres.

    Returns:
        The queue in the current lidar frame, timestamps as ages in seconds.
    """
    memory = transform_memory(truncate_memory(memory, length), ego_pose_inv)
    memory = memory._replace(timestamp=memory.timestamp + timestamp.reshape(-1, 1, 1))
    return restart_streams(memory, prev_exists, pseudo_points)


def push_detections(memory: MemoryState, scores: Tensor, embedding: Tensor, boxes: Tensor, topk: int) -> MemoryState:
    """Prepend the ``topk`` best queries of this frame, detached, with age 0 and identity pose.

    Args:
        memory: In the current lidar frame.
        scores: (B, n) best class probability of each query.
        embedding: (B, n, C) post-normed output of the last decoder layer.
        boxes: (B, n, 10) predicted boxes, centres in metres, velocity last.
        topk: Rows to add.
    """
    index = scores.detach().topk(topk, dim=1).indices.unsqueeze(-1)
    # gather, as take_along_dim has no ONNX export.
    rows_embedding = embedding.detach().gather(1, index.expand(-1, -1, embedding.shape[-1]))
    rows_boxes = boxes.detach().gather(1, index.expand(-1, -1, boxes.shape[-1]))
    batch = scores.shape[0]
    identity = torch.eye(4, dtype=boxes.dtype, device=boxes.device).expand(batch, topk, 4, 4)
    return MemoryState(
        embedding=torch.cat((rows_embedding, memory.embedding), dim=1),
        reference_point=torch.cat((rows_boxes[..., :3], memory.reference_point), dim=1),
        timestamp=torch.cat((memory.timestamp.new_zeros(batch, topk, 1), memory.timestamp), dim=1),
        egopose=torch.cat((identity, memory.egopose), dim=1),
        velo=torch.cat((rows_boxes[..., -2:], memory.velo), dim=1),
    )


def post_update(memory: MemoryState, *, timestamp: Tensor, ego_pose: Tensor) -> MemoryState:
    """Bring the queue of the current frame back to the global frame for storage.

    Args:
        memory: In the current lidar frame, new rows included.
        timestamp: (B,) absolute seconds, float64.
        ego_pose: (B, 4, 4) current lidar to global frame.
    """
    memory = transform_memory(memory, ego_pose)
    return memory._replace(timestamp=memory.timestamp - timestamp.reshape(-1, 1, 1))
