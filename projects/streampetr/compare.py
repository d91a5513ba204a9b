"""Exported engines against the PyTorch model over a stream of frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime.decode import last_level
from mdp_mmdet3d.runtime.host_memory import HostMemory
from mdp_mmdet3d.runtime.stream import Frame, StreamRunner

from .export import image_transform
from .frame import FrameInputs
from .memory import MemoryState
from .memory_rows import Candidates, memory_difference, tie_margin
from .normalisation import converted

Mode = Literal["teacher_forced", "free_running"]


@dataclass(frozen=True)
class StreamDifference:
    """Largest absolute differences, engines minus PyTorch, per frame.

    Attributes:
        mode: ``"teacher_forced"`` (the engines start each frame from PyTorch's memory; everything is compared) or
            ``"free_running"`` (each keeps its own; only the learned queries are compared, because queries that score
            alike may be propagated in another order. Where one of them is the last that the memory takes, both go on
            with different memories, and what follows shows that: these figures are no proof of a mistake).
        logits: Class logits of the last level.
        boxes: Box codes of the last level: metres, log metres, sine and cosine, metres per second.
        memory: Rows of the memory after the frame, in the lidar frame: embeddings, metres, metres per second, seconds,
            pose entries. Rows that near-ties allow to change places are paired (`memory_difference`). Empty if each
            keeps its own, or there is none.
        near_ties: New rows of the memory for which more than one query scored enough, up to rounding.
    """

    mode: Mode
    logits: tuple[float, ...]
    boxes: tuple[float, ...]
    memory: tuple[float, ...] = ()
    near_ties: tuple[int, ...] = ()

    @property
    def max_logits(self) -> float:
        """Over all frames."""
        return float(np.max(self.logits))

    @property
    def max_boxes(self) -> float:
        """Over all frames."""
        return float(np.max(self.boxes))

    @property
    def max_memory(self) -> float:
        """Over all frames; 0 if no memory was compared."""
        return float(np.max(self.memory, initial=0.0))


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
        frames: At least one frame, normalised for the model whatever the deployment takes. The stream restarts
            where the scene changes.
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
    origin = np.zeros(3)
    image = runner.manifest.image
    trained = image_transform(model.data_preprocessor, image.size, image.source_size)
    new = runner.manifest.memory.post_length - runner.manifest.memory.pre_length
    found = StreamDifference(mode, (), ())
    try:
        for frame in frames:
            if frame.scene_token != scene or not frame.prev_exists:
                memory, origin = None, frame.ego_pose[:3, 3]
                runner.reset()
            # Any global frame will do. Kilometres from its origin both would round poses to a tenth of a millimetre.
            near = replace(frame, ego_pose=_shifted(frame.ego_pose, origin))
            if memory is not None and mode == "teacher_forced":
                runner.memory = host_memory(memory)
            queries, memory = run_reference(model, near, memory)
            output = runner.run(converted(near, trained, image))
            scene = frame.scene_token
            logits, boxes = last_level(
                output.cls_scores, output.bbox_preds, runner.manifest.layout, runner.manifest.num_queries
            )
            rows = slice(None if mode == "teacher_forced" else model.pts_bbox_head.reference_points.num_embeddings)
            found = replace(
                found,
                logits=(*found.logits, float(np.abs(logits - queries.logits)[rows].max())),
                boxes=(*found.boxes, float(np.abs(boxes - queries.boxes)[rows].max())),
            )
            if mode == "teacher_forced" and runner.manifest.memory.post_length:
                margin = tie_margin(logits, queries.logits)
                rest = memory_difference(runner.memory_on_host(), host_memory(memory), queries, new, margin)
                found = replace(
                    found, memory=(*found.memory, rest.largest), near_ties=(*found.near_ties, rest.near_ties)
                )
    finally:
        for module, mode_before in training.items():
            module.training = mode_before
        runner.reset()
    return found


def _shifted(pose: np.ndarray, origin: np.ndarray) -> np.ndarray:
    moved = np.array(pose, np.float64)
    moved[:3, 3] -= origin
    return moved


def run_reference(model: nn.Module, frame: Frame, memory: MemoryState | None) -> tuple[Candidates, MemoryState]:
    """One frame in PyTorch: its queries, and the memory after it.

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
    last = (output.all_cls_scores[-1, 0], output.all_bbox_preds[-1, 0], output.embedding[0])
    return Candidates(*(value.cpu().numpy() for value in last)), memory


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
        tolerance: Largest teacher-forced difference of the logits, of the box codes and of the memory.

    Returns:
        ``frames`` and, for both modes, the largest differences of ``logits`` and ``boxes``; teacher-forced also that of
        the ``memory``, and of how many of its rows the place was decided by rounding (``near_ties``).

    Raises:
        DeploymentError: A teacher-forced difference exceeds the tolerance.
    """
    runner = StreamRunner(folder)
    result: dict[str, Any] = {"frames": len(frames)}
    for mode in ("teacher_forced", "free_running"):
        difference = compare_stream(model, runner, frames, mode)
        result[mode] = {"logits": difference.max_logits, "boxes": difference.max_boxes}
        if mode == "teacher_forced":
            result[mode] |= {"memory": difference.max_memory, "near_ties": sum(difference.near_ties)}
    forced = result["teacher_forced"]
    # One by one: NaN is not within a tolerance, wherever it stands.
    if not all(forced[name] <= tolerance for name in ("logits", "boxes", "memory")):
        raise DeploymentError(
            f"{folder} differs from PyTorch by {forced['logits']:.2e} (logits), {forced['boxes']:.2e} (box codes) and "
            f"{forced['memory']:.2e} (memory after a frame), more than {tolerance:g}: do not deploy it; the ONNX "
            "Runtime or PyTorch release may be at fault"
        )
    return result
