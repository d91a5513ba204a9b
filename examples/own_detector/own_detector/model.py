"""A detector of bright markers: a residual backbone of its own, a heat map, a head that only training uses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


@MODELS.register_module()
class MarkerDetector(BaseModel):
    """Finds markers as peaks of a heat map at a quarter of the image's size.

    Args:
        width: Channels of the backbone.
        blocks: Residual blocks.
        data_preprocessor: See MMEngine's ``BaseModel``.
    """

    def __init__(self, width: int = 48, blocks: int = 4, data_preprocessor: dict | None = None) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.heat = nn.Conv2d(width, 1, 1)
        self.edges = nn.Conv2d(width, 1, 1)  # guides training, is not deployed

    def forward(self, inputs: Tensor, data_samples: list[Tensor] | None = None, mode: str = "tensor"):
        """``inputs`` (B, 3, H, W); ``data_samples`` B maps (H / 4, W / 4) with 1 where a marker is.

        Returns:
            Heat map logits (B, 1, H / 4, W / 4) as ``"tensor"``, a dictionary of losses as ``"loss"``, and as
            ``"predict"`` the most likely place of each image, (B, 2) row and column on the heat map.
        """
        x = self.blocks(self.stem(inputs))
        logits = self.heat(x)
        if mode == "tensor":
            return logits
        if mode == "loss":
            weight = torch.tensor(20.0, device=x.device)
            where = torch.stack(list(data_samples))[:, None].to(x.device)
            edges = F.max_pool2d(where, 3, 1, 1) - where
            return dict(
                loss_heat=F.binary_cross_entropy_with_logits(logits, where, pos_weight=weight),
                aux_loss_edges=F.binary_cross_entropy_with_logits(self.edges(x), edges, pos_weight=weight),
            )
        best = logits.flatten(1).argmax(1)
        return torch.stack((best // logits.shape[-1], best % logits.shape[-1]), dim=1)
