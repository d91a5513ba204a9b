"""GridMask: blanks a grid of squares of the training images (Chen et al., arXiv 2001.04086)."""

from __future__ import annotations

import torch
from mmdet3d.registry import MODELS
from torch import Tensor, nn

CANVAS = 1.5  # the mask is drawn larger than the image, so that its offset does not show at the border


def band(length: int, period: int, width: int, offset: int) -> Tensor:
    """(length,) True inside bands of ``width`` that repeat with ``period`` behind ``offset``, cut from a canvas."""
    canvas = int(CANVAS * length)
    start = (canvas - length) // 2
    position = torch.arange(start, start + length) - offset
    return (position >= 0) & (position % period < width) & (position // period < canvas // period)


def grid_mask(height: int, width: int, period: int, ratio: float, offset_y: int, offset_x: int) -> Tensor:
    """(H, W) mask: 1 on horizontal and vertical bands, 0 on the squares between them."""
    band_width = min(max(int(period * ratio + 0.5), 1), period - 1)
    rows = band(height, period, band_width, offset_y)
    columns = band(width, period, band_width, offset_x)
    return (rows[:, None] | columns[None, :]).float()


@MODELS.register_module()
class GridMask(nn.Module):
    """Blank one random grid of squares in all images of a batch; does nothing in evaluation mode.

    Args:
        prob: Probability that a batch is masked.
        ratio: Width of the bands that stay, as a share of the period.
    """

    def __init__(self, prob: float = 0.7, ratio: float = 0.5) -> None:
        super().__init__()
        self.prob = prob
        self.ratio = ratio

    def forward(self, images: Tensor) -> Tensor:
        """Mask normalised images (I, 3, H, W)."""
        if not self.training or torch.rand(()).item() >= self.prob:
            return images
        height, width = images.shape[-2:]
        period = int(torch.randint(2, height, ()))
        offset_y, offset_x = torch.randint(period, (2,)).tolist()
        return images * grid_mask(height, width, period, self.ratio, offset_y, offset_x).to(images)
