"""CPFPN: a feature pyramid without the parameters that would receive no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmdet3d.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn


@MODELS.register_module()
class CPFPN(BaseModule):
    """Top-down pyramid whose 3x3 convolution exists on the finest level only.

    Args:
        in_channels: Channels of each input, finest first.
        out_channels: Channels of each output.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg or {"type": "Xavier", "layer": "Conv2d", "distribution": "uniform"})
        self.lateral_convs = nn.ModuleList(
            ConvModule(channels, out_channels, 1, act_cfg=None) for channels in in_channels
        )
        self.fpn_convs = nn.ModuleList([ConvModule(out_channels, out_channels, 3, padding=1, act_cfg=None)])

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Fuse the levels.

        Args:
            inputs: One feature map (B, C_i, h_i, w_i) per lateral convolution, finest first.

        Returns:
            One feature map (B, out_channels, h_i, w_i) per input.

        Raises:
            ValueError: The number of inputs differs from the number of lateral convolutions.
        """
        if len(inputs) != len(self.lateral_convs):
            raise ValueError(f"CPFPN takes {len(self.lateral_convs)} inputs but got {len(inputs)}")
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, inputs)]
        for i in range(len(levels) - 1, 0, -1):
            upsampled = F.interpolate(levels[i], size=levels[i - 1].shape[2:], mode="nearest")
            levels[i - 1] = levels[i - 1] + upsampled
        levels[0] = self.fpn_convs[0](levels[0])
        return levels
