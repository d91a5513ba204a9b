"""Calibration frames of streams: a pruned detector is compared with the dense one from the same memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mdp_mmdet3d.surgery.repair import Frame, query_weights

from .frame import FrameInputs, frame_inputs
from .memory import MemoryState, truncate_memory

PIXELS_TOGETHER = 600_000
"""Images of this many pixels run as one batch: small ones cost more calls than arithmetic."""


@dataclass(frozen=True)
class StreamFrames:
    """A batch of frames of any streams, each with the dense model's memory of its stream.

    Attributes:
        imgs: (B, N, 3, H, W) normalised images.
        frame: Geometry and time.
        memory: As the dense model left it after the frames before.
        weights: (B, n) what each query counts in the fits.
    """

    imgs: Tensor
    frame: FrameInputs
    memory: MemoryState
    weights: Tensor

    def __call__(self, model: nn.Module) -> Any:
        """What a deployed model computes: all but the predictions of the last level is left out."""
        memory, kept = self.memory, model.pts_bbox_head.kept_channels
        if kept is not None:
            memory = memory._replace(embedding=memory.embedding[..., kept.to(memory.embedding.device)])
        return model.run_frame(model.extract_img_feat(self.imgs), self.frame, memory, last_level_only=True)


@torch.no_grad()
def calibration_frames(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], count: int, stride: int = 1
) -> list[Frame]:
    """Every ``stride``-th batch of streams as `StreamFrames`; the dense model runs over those between.

    Args:
        model: The dense model in evaluation mode.
        batches: In stream order.
        count: Frames wanted.
        stride: Every so manyth batch is used.
    """
    found: list[StreamFrames] = []
    memory: MemoryState | None = None
    frames = 0
    for i, batch in enumerate(batches):
        data = model.data_preprocessor(dict(batch), False)
        imgs = data["inputs"]["imgs"]
        frame = frame_inputs(data["data_samples"], imgs)
        if memory is None or len(memory.embedding) != len(imgs):
            memory = model.pts_bbox_head.empty_memory(len(imgs))
            frame = frame._replace(prev_exists=torch.zeros_like(frame.prev_exists))
        output, after = model.run_frame(model.extract_img_feat(imgs), frame, memory, last_level_only=True)
        if i % stride == 0:
            weights = query_weights(output.all_cls_scores[-1].sigmoid())
            found.append(StreamFrames(imgs, frame, memory, weights))
            frames += len(imgs)
        if frames >= count:
            break
        memory = truncate_memory(after, model.pts_bbox_head.memory_len)
    if not found:
        return []
    together = max(1, PIXELS_TOGETHER // found[0].imgs[:, :, 0].numel())
    return [_joined(found[i : i + together]) for i in range(0, len(found), together)]


def _joined(parts: Sequence[StreamFrames]) -> StreamFrames:
    """Several batches as one; images of another size than the first's are left out."""
    parts = [part for part in parts if part.imgs.shape[1:] == parts[0].imgs.shape[1:]]

    def joined(values: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [torch.cat(each) if isinstance(each[0], Tensor) else each[0] for each in zip(*values)]

    return StreamFrames(
        torch.cat([part.imgs for part in parts]),
        FrameInputs(*joined([part.frame for part in parts])),
        MemoryState(*joined([part.memory for part in parts])),
        torch.cat([part.weights for part in parts]),
    )
