"""Geometry of the image tokens: the frustum of every token in the lidar frame, and its cone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

IntrinsicsTiling = Literal["camera_minor", "camera_major"]

# Which depth bins describe a token's cone; the reference reads channels 102..104 of its 192, which is bin 34.
CONE_NEAR_BIN = 34


def depth_bins(num_bins: int, depth_start: float, depth_end: float, use_lid: bool = True) -> Tensor:
    """Depths in metres at which a token's ray is sampled.

    Args:
        num_bins: Number of bins D.
        depth_start: First depth in metres.
        depth_end: Depth in metres that bin D would have.
        use_lid: Linearly increasing spacing (LID) instead of a uniform one.

    Returns:
        Tensor of shape (D,).
    """
    index = torch.arange(num_bins, dtype=torch.float32)
    if use_lid:
        return depth_start + (depth_end - depth_start) / (num_bins * (num_bins + 1)) * index * (index + 1)
    return depth_start + (depth_end - depth_start) / num_bins * index


def frustum_points(
    pad_hw: Tensor | tuple[int, int], stride: int, depths: Tensor, img2lidar: Tensor, position_range: Tensor
) -> Tensor:
    """Points along the ray of each token, normalised by the position range and not clamped.

    Args:
        pad_hw: Height and width in pixels of the padded network image.
        stride: Pixels per token.
        depths: (D,) metres.
        img2lidar: (B, N, 4, 4) inverse of lidar2img.
        position_range: (6,) metres: the minimum and maximum corner.

    Returns:
        Tensor of shape (B, N * h * w, D, 3); tokens in (camera, row, column) order.
    """
    height, width = int(pad_hw[0]), int(pad_hw[1])
    # Divided and multiplied back like the reference, so that an exported graph keeps pad_hw as a live input.
    v = (torch.arange(height // stride).to(depths) * stride + stride / 2) / height * pad_hw[0]
    u = (torch.arange(width // stride).to(depths) * stride + stride / 2) / width * pad_hw[1]
    grid_v, grid_u, grid_d = torch.meshgrid(v, u, depths, indexing="ij")
    scale = grid_d.clamp(min=1e-5)
    pixels = torch.stack((grid_u * scale, grid_v * scale, grid_d, torch.ones_like(grid_d)), dim=-1)
    points = pixels.reshape(1, 1, -1, 4) @ img2lidar.transpose(-1, -2)
    points = points[..., :3].reshape(img2lidar.shape[0], -1, depths.shape[0], 3)
    return (points - position_range[:3]) / (position_range[3:] - position_range[:3])


def token_cone(points: Tensor, intrinsics: Tensor, tiling: IntrinsicsTiling) -> Tensor:
    """Eight numbers that describe a token's cone: focal lengths / 1000 and two points of its ray.

    Args:
        points: (B, M, D, 3) of :func:`frustum_points`.
        intrinsics: (B, N, 4, 4) in pixels of the network image.
        tiling: ``camera_minor`` gives token t the focal lengths of camera ``t mod N`` (what the official
            weights were trained with), ``camera_major`` those of the camera that sees it.

    Returns:
        Tensor of shape (B, M, 8).
    """
    # Flipped images have a negative focal length.
    focal = torch.stack((intrinsics[..., 0, 0], intrinsics[..., 1, 1]), dim=-1).abs() / 1000.0
    tokens_per_camera = points.shape[1] // intrinsics.shape[1]
    if tiling == "camera_minor":
        focal = focal.repeat(1, tokens_per_camera, 1)
    else:
        focal = focal.repeat_interleave(tokens_per_camera, dim=1)
    return torch.cat((focal, points[:, :, -1], points[:, :, CONE_NEAR_BIN]), dim=-1)
