"""Network inputs of one normalisation as those of another: a factor and an offset per channel, and their order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from mdp_mmdet3d.runtime.manifest import ImageTransform
from mdp_mmdet3d.runtime.stream import Frame

Affine = tuple[tuple[int, ...], np.ndarray, np.ndarray]
"""Source channel, factor (3,) and offset (3,) of every target channel; float32."""


def conversion(source: ImageTransform, target: ImageTransform) -> Affine | None:
    """What turns an image normalised as ``source`` says into one normalised as ``target`` says; None if nothing does.

    Only mean, deviation and channel order count.
    """
    order = tuple(source.channel_order.index(channel) for channel in target.channel_order)
    mean, std = (np.array(values, np.float64)[list(order)] for values in (source.mean, source.std))
    scale, offset = std / np.array(target.std), (mean - np.array(target.mean)) / np.array(target.std)
    # Means are kept to five decimals.
    if order == tuple(range(len(order))) and np.allclose(scale, 1, atol=1e-6) and np.allclose(offset, 0, atol=1e-6):
        return None
    return order, scale.astype(np.float32), offset.astype(np.float32)


def converted(frame: Frame, source: ImageTransform, target: ImageTransform) -> Frame:
    """A frame whose images are normalised as ``target`` says."""
    found = conversion(source, target)
    if found is None:
        return frame
    order, scale, offset = found
    return replace(frame, img=frame.img[:, list(order)] * scale[:, None, None] + offset[:, None, None])


class Convert(nn.Module):
    """`conversion` as the first layer of an engine: (1, N, 3, H, W) to the same shape."""

    def __init__(self, affine: Affine) -> None:
        super().__init__()
        order, scale, offset = affine
        self.order: Tensor | None = None if order == tuple(range(len(order))) else torch.tensor(order)
        self.scale, self.offset = (torch.from_numpy(value).view(1, 1, -1, 1, 1) for value in (scale, offset))

    def forward(self, img: Tensor) -> Tensor:
        """Applied where the image is: padding of later layers stays zero of the model's own normalisation."""
        if self.order is not None:
            img = img.index_select(2, self.order.to(img.device))
        return img * self.scale.to(img.device) + self.offset.to(img.device)
