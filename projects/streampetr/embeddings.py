"""Fixed encodings of positions, times and motion, and the inverse sigmoid."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of ``x`` clamped to [0, 1], with both sides of the ratio bounded below by ``eps``.

    The official checkpoints were trained with 1e-5, AWML's with 1e-4; the difference is visible.
    """
    x = x.clamp(0.0, 1.0)
    return torch.log(x.clamp(min=eps) / (1.0 - x).clamp(min=eps))


def sine_embedding(x: Tensor, num_feats: int, temperature: float = 1e4) -> Tensor:
    """Sinusoid of each scalar, sine and cosine interleaved.

    Args:
        x: Any shape (...); evaluated in the precision of ``x``.
        num_feats: Even number of features per scalar.
        temperature: Base of the geometric series of wavelengths.

    Returns:
        Tensor of shape (..., num_feats).
    """
    exponent = torch.arange(num_feats // 2, dtype=x.dtype, device=x.device) * (2.0 / num_feats)
    angle = (x * (2.0 * math.pi)).unsqueeze(-1) / temperature**exponent
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def point_embedding(points: Tensor, num_feats: int, temperature: float = 1e4) -> Tensor:
    """Sine embedding of normalised points, axes in the order (y, x, z) that the checkpoints need.

    Args:
        points: (..., 3).
        num_feats: Features per axis.
        temperature: See :func:`sine_embedding`.

    Returns:
        Tensor of shape (..., 3 * num_feats).
    """
    x, y, z = points.unbind(-1)
    return torch.cat([sine_embedding(axis, num_feats, temperature) for axis in (y, x, z)], dim=-1)


def motion_embedding(motion: Tensor, num_octaves: int = 6) -> Tensor:
    """NeRF encoding ``[sin(2^f m), cos(2^f m)]`` for f = 0 .. num_octaves - 1, without 2 pi and raw input.

    Args:
        motion: (..., 15): velocity (2), age in seconds (1), first three rows of the relative pose (12).

    Returns:
        Tensor of shape (..., 2 * num_octaves * 15).
    """
    parts = []
    for octave in range(num_octaves):
        scaled = motion * float(2**octave)
        parts += [scaled.sin(), scaled.cos()]
    return torch.cat(parts, dim=-1)
