"""Exported engines against the PyTorch model over a stream of frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mdp_mmdet3d.deploy.decode import last_level
from mdp_mmdet3d.deploy.errors import DeploymentError
from mdp_mmdet3d.deploy.stream import Frame, HostMemory, StreamRunner
from projects.streampetr import FrameInputs, MemoryState

Mode = Literal["teacher_forced", "free_running"]


@dataclass(frozen=True)
class StreamDifference:
    """Largest absolute differences, engines minus PyTorch, per frame.

    Attributes:
        mode: ``"teacher_forced"`` (the engines start each frame from PyTorch's memory; all rows compared) or
            ``"free_running"`` (each keeps its own; as near-ties may order the propagated queries differently,
            only the learned ones are compared).
        logits: Class logits of the last level.
        boxes: Box codes of the last level: metres, log metres, sine and cosine, metres per second.
    """

    mode: Mode
    logits: tuple[float, ...]
    boxes: tuple[float, ...]

    @property
    def max_logits(self) -> float:
        """Over all frames."""
        return max(self.logits)

    @property
    def max_boxes(self) -> float:
        """Over all frames."""
        return max(self.boxes)


@torch.no_grad()
def compare_stream(
    model: nn.Module,
    runner: StreamRunner | str | Path,
    frames: Sequence[Frame],
    mode: Mode = "teacher_forced",
) -> StreamDifference:
    """Run a stream through the model and through its engines.

    Args:
        model: The `StreamPETR` that was exported; its own memory is not touched.
        runner: Deployment folder or loaded runner; its memory is reset before and after.
        frames: At least one frame. The stream restarts where the scene changes.
        mode: See `StreamDifference`.

    Raises:
        DeploymentError: No frame, or an unknown mode.
    """
    if not frames or mode not in ("teacher_forced", "free_running"):
        raise DeploymentError(f"nothing to compare: {len(frames)} frames, mode={mode!r}")
    if not isinstance(runner, StreamRunner):
        runner = StreamRunner(runner)
    training = {module: module.training for module in model.modules()}
    for module in training:
        module.training = False
    runner.reset()
    memory: MemoryState | None = None
    scene: str | None = None
    logits, boxes = [], []
    try:
        for frame in frames:
            if frame.scene_token != scene or not frame.prev_exists:
                memory = None
                runner.reset()
            if memory is not None and mode == "teacher_forced":
                runner.memory = host_memory(memory)
            expected, memory = run_reference(model, frame, memory)
            output = runner.run(frame)
            scene = frame.scene_token
            found = last_level(
                output.cls_scores, output.bbox_preds, runner.manifest.layout, runner.manifest.num_queries
            )
            rows = slice(None if mode == "teacher_forced" else model.pts_bbox_head.reference_points.num_embeddings)
            logits.append(float(np.abs(found[0] - expected[0])[rows].max()))
            boxes.append(float(np.abs(found[1] - expected[1])[rows].max()))
    finally:
        for module, mode_before in training.items():
            module.training = mode_before
        runner.reset()
    return StreamDifference(mode, tuple(logits), tuple(boxes))


def run_reference(
    model: nn.Module, frame: Frame, memory: MemoryState | None
) -> tuple[tuple[np.ndarray, np.ndarray], MemoryState]:
    """One frame in PyTorch: last-level logits (Q, C), box codes (Q, 10), and the memory after it.

    Args:
        model: A `StreamPETR` in eval mode.
        frame: The frame.
        memory: After the previous frame; None starts a stream.
    """
    device = model.pts_bbox_head.pc_range.device

    def tensor(values: np.ndarray | float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=dtype, device=device)[None]

    img = tensor(frame.img)
    inputs = FrameInputs(
        pad_hw=(img.shape[-2], img.shape[-1]),
        intrinsics=tensor(frame.intrinsics),
        img2lidar=tensor(np.linalg.inv(frame.lidar2img)),
        ego_pose=tensor(frame.ego_pose),
        ego_pose_inv=tensor(np.linalg.inv(frame.ego_pose)),
        timestamp=tensor(frame.timestamp, torch.float64),
        prev_exists=tensor(float(memory is not None)),
    )
    output, memory = model.run_frame(model.extract_img_feat(img), inputs, memory, last_level_only=True)
    raw = output.all_cls_scores[-1, 0].cpu().numpy(), output.all_bbox_preds[-1, 0].cpu().numpy()
    return raw, memory


def host_memory(memory: MemoryState) -> HostMemory:
    """PyTorch's memory of one stream, in global coordinates, as the runtime's."""
    embedding, reference_point, timestamp, egopose, velo = (value.cpu().numpy() for value in memory)
    return HostMemory(embedding, reference_point, egopose, velo, timestamp.astype(np.float64), np.eye(4))


def check_against_pytorch(
    model: nn.Module, folder: str | Path, frames: Sequence[Frame], tolerance: float = 1e-3
) -> dict[str, Any]:
    """Compare a float32 deployment with its model, for ``deployment.json``.

    Args:
        model: The `StreamPETR` that was exported.
        folder: Its deployment.
        frames: At least one.
        tolerance: Largest teacher-forced difference of the logits, and of the box codes.

    Returns:
        ``frames`` and, for both modes, the largest differences of ``logits`` and ``boxes``.

    Raises:
        DeploymentError: A teacher-forced difference exceeds the tolerance.
    """
    runner = StreamRunner(folder)
    result: dict[str, Any] = {"frames": len(frames)}
    for mode in ("teacher_forced", "free_running"):
        difference = compare_stream(model, runner, frames, mode)
        result[mode] = {"logits": difference.max_logits, "boxes": difference.max_boxes}
    forced = result["teacher_forced"]
    if not max(forced["logits"], forced["boxes"]) <= tolerance:
        raise DeploymentError(
            f"{folder} differs from PyTorch by {forced['logits']:.2e} (logits) and {forced['boxes']:.2e} (box codes), "
            f"more than {tolerance:g}: do not deploy it; the ONNX Runtime or PyTorch release may be at fault"
        )
    return result
