"""Geometry and time of a frame, collected from the metainfo of MMDetection3D data samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from mmdet3d.structures import Det3DDataSample
from torch import Tensor


class FrameInputs(NamedTuple):
    """Geometry and time of one frame.

    Attributes:
        pad_hw: Height and width in pixels of the padded network image.
        intrinsics: (B, N, 4, 4) of the network image.
        img2lidar: (B, N, 4, 4) inverse of lidar2img.
        ego_pose: (B, 4, 4) lidar to global frame.
        ego_pose_inv: (B, 4, 4) its inverse.
        timestamp: (B,) seconds, float64.
        prev_exists: (B,) 1 where the stream goes on, 0 where it starts.
    """

    pad_hw: tuple[int, int]
    intrinsics: Tensor
    img2lidar: Tensor
    ego_pose: Tensor
    ego_pose_inv: Tensor
    timestamp: Tensor
    prev_exists: Tensor


def frame_inputs(samples: Sequence[Det3DDataSample], imgs: Tensor) -> FrameInputs:
    """Collect the geometry of a batch from its metainfo, on the device of the images.

    Args:
        samples: With metainfo ``intrinsics`` and ``lidar2img`` (N, 4, 4), ``ego_pose`` and ``ego_pose_inv``
            (4, 4), ``timestamp`` (seconds) and ``prev_exists``.
        imgs: (B, N, 3, H, W).

    Raises:
        ValueError: A key is missing, or the number of samples or cameras does not fit the images.
    """
    if len(samples) != len(imgs):
        raise ValueError(f"{len(imgs)} samples of images came with {len(samples)} data samples")

    def stack(key: str) -> np.ndarray:
        return np.stack([np.asarray(metainfo(samples, i, key), np.float64) for i in range(len(samples))])

    def tensor(values: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).to(imgs.device)

    lidar2img = stack("lidar2img")
    if lidar2img.shape[1] != imgs.shape[1]:
        raise ValueError(f"'lidar2img' is for {lidar2img.shape[1]} cameras, the images are {imgs.shape[1]}")
    return FrameInputs(
        pad_hw=(imgs.shape[-2], imgs.shape[-1]),
        intrinsics=tensor(stack("intrinsics")),
        img2lidar=tensor(np.linalg.inv(lidar2img)),
        ego_pose=tensor(stack("ego_pose")),
        ego_pose_inv=tensor(stack("ego_pose_inv")),
        timestamp=tensor(stack("timestamp"), torch.float64),
        prev_exists=tensor(stack("prev_exists")),
    )


def metainfo(samples: Sequence[Det3DDataSample], index: int, key: str) -> Any:
    """Metainfo ``key`` of one sample.

    Raises:
        ValueError: The sample does not have it.
    """
    value = samples[index].metainfo.get(key)
    if value is None:
        raise ValueError(
            f"data sample {index} lacks metainfo {key!r}, which StreamPETR needs; pack it in the pipeline "
            f"(present: {', '.join(sorted(samples[index].metainfo)) or 'nothing'})"
        )
    return value
