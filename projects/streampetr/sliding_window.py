"""Sliding-window training: every item is a short clip that starts without memory (StreamPETR, arXiv 2303.11926)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from mmdet3d.registry import DATASETS
from mmdet3d.structures import Det3DDataSample
from torch import Tensor
from torch.utils.data import Dataset

from mdp_mmdet3d.errors import MdpError

from .frame import FrameInputs, frame_inputs
from .memory import MemoryState

WINDOW_KEY = "window"


@DATASETS.register_module()
class SlidingWindowDataset(Dataset):
    """Clips of a `StreamNuScenesDataset`: a frame and most of its predecessors, in order.

    An item has the images of all frames, (frames * cameras, 3, H, W), and the data sample of its last frame, whose
    metainfo holds the samples of all frames (``window``) and how many of the last are learned from (``grad_frames``).
    Within a clip ``prev_exists`` says whether the clip's previous frame is of the same scene.

    Args:
        dataset: Config of the data set of single frames, or the data set.
        num_frames: Frames of a clip.
        num_dropped: So many more predecessors are looked at, of which as many are left out at random.
        grad_frames: Frames at the end that have losses.

    Raises:
        MdpError: The counts contradict each other.
    """

    def __init__(self, dataset: Any, num_frames: int = 8, num_dropped: int = 1, grad_frames: int = 2) -> None:
        if not 1 <= grad_frames <= num_frames or num_dropped < 0:
            raise MdpError(
                f"num_frames={num_frames}, num_dropped={num_dropped}, grad_frames={grad_frames}: a clip needs "
                "1 <= grad_frames <= num_frames and num_dropped >= 0"
            )
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self.num_frames = num_frames
        self.num_dropped = num_dropped
        self.grad_frames = grad_frames

    @property
    def metainfo(self) -> dict:
        """That of the frames."""
        return self.dataset.metainfo

    def full_init(self) -> None:
        """Load the annotations."""
        self.dataset.full_init()

    def __len__(self) -> int:
        return len(self.dataset)

    def frame_indices(self, index: int) -> list[int]:
        """Frames of the clip that ends with ``index``; the data set's first frame stands in for those before it."""
        before = range(index - self.num_frames - self.num_dropped + 1, index)
        chosen = sorted(random.sample(before, self.num_frames - 1))
        return [max(0, i) for i in chosen] + [index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        frames = [self.dataset[i] for i in self.frame_indices(index)]
        samples = [frame["data_samples"] for frame in frames]
        for i, sample in enumerate(samples):
            goes_on = i > 0 and samples[i - 1].scene_token == sample.scene_token
            sample.set_metainfo(dict(prev_exists=goes_on))
        last = samples[-1].clone()
        last.set_metainfo({WINDOW_KEY: samples, "grad_frames": self.grad_frames})
        return {"inputs": {"img": torch.cat([frame["inputs"]["img"] for frame in frames])}, "data_samples": last}


class WindowDetector(Protocol):
    """What `window_losses` needs of a detector."""

    def eval(self) -> Any:
        """Switch to evaluation."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training."""

    def extract_img_feat(self, imgs: Tensor) -> Tensor:
        """Image features."""

    def run_frame(self, img_feats: Tensor, frame: FrameInputs, memory: MemoryState | None) -> tuple[Any, MemoryState]:
        """One frame."""

    def frame_losses(
        self, imgs: Tensor, samples: Sequence[Det3DDataSample], memory: MemoryState | None
    ) -> tuple[dict[str, Tensor], MemoryState]:
        """Losses of one frame, and the memory behind it."""


def window_losses(detector: WindowDetector, imgs: Tensor, samples: Sequence[Det3DDataSample]) -> dict[str, Tensor]:
    """Losses of a batch of clips.

    The first frames run in evaluation mode and without gradients and only fill the memory, which starts empty. The
    memory is detached from frame to frame.

    Args:
        detector: In training mode.
        imgs: (B, frames * N, 3, H, W).
        samples: Of `SlidingWindowDataset`.

    Returns:
        The losses of each learned frame t, prefixed ``frame_<t>_``.
    """
    windows = [sample.metainfo[WINDOW_KEY] for sample in samples]
    num_frames, grad_frames = len(windows[0]), samples[0].metainfo["grad_frames"]
    frames = imgs.unflatten(1, (num_frames, -1)).unbind(1)
    memory: MemoryState | None = None
    detector.eval()
    with torch.no_grad():
        for t in range(num_frames - grad_frames):
            own = [window[t] for window in windows]
            features = detector.extract_img_feat(frames[t])
            _, memory = detector.run_frame(features, frame_inputs(own, frames[t]), memory)
    detector.train()
    losses: dict[str, Tensor] = {}
    for t in range(num_frames - grad_frames, num_frames):
        found, memory = detector.frame_losses(frames[t], [window[t] for window in windows], memory)
        losses |= {f"frame_{t}_{name}": value for name, value in found.items()}
    return losses
