"""VoVNet with effective squeeze-excitation (Lee & Park, arXiv 1911.06667), names as in V2-99 checkpoints."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mmdet3d.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn


@dataclass(frozen=True)
class VoVNetSpec:
    """Widths and depths of a VoVNet; stages are numbered 2 to 5.

    Attributes:
        stem: Output channels of the three 3x3 convolutions of the stem (strides 2, 1, 2).
        inner: Channels of the 3x3 convolutions of each stage.
        outer: Output channels of each stage.
        blocks: One-shot-aggregation blocks of each stage.
        convs_per_block: 3x3 convolutions of a block.
    """

    stem: tuple[int, int, int]
    inner: tuple[int, int, int, int]
    outer: tuple[int, int, int, int]
    blocks: tuple[int, int, int, int]
    convs_per_block: int = 5


SPECS = {
    "V-99-eSE": VoVNetSpec((64, 64, 128), (128, 160, 192, 224), (256, 512, 768, 1024), (1, 3, 9, 3)),
}


def _conv_norm_relu(
    name: str, in_channels: int, out_channels: int, kernel: int, stride: int = 1
) -> OrderedDict[str, nn.Module]:
    norm = nn.BatchNorm2d(out_channels)
    norm.requires_grad_(False)
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return OrderedDict({f"{name}/conv": conv, f"{name}/norm": norm, f"{name}/relu": nn.ReLU(inplace=True)})


class EffectiveSqueezeExcitation(nn.Module):
    """Gate of the channels: global mean, one 1x1 convolution, hard sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same shape."""
        return x * F.hardsigmoid(self.fc(x.mean(dim=(2, 3), keepdim=True)))


class OneShotAggregation(nn.Module):
    """A chain of 3x3 convolutions; its input and all outputs are concatenated and mixed by a 1x1 convolution."""

    def __init__(self, name: str, in_channels: int, inner: int, outer: int, num_convs: int, identity: bool) -> None:
        super().__init__()
        self.identity = identity
        widths = [in_channels] + [inner] * num_convs
        self.layers = nn.ModuleList(
            nn.Sequential(_conv_norm_relu(f"{name}_{i}", widths[i], inner, 3)) for i in range(num_convs)
        )
        self.concat = nn.Sequential(_conv_norm_relu(f"{name}_concat", sum(widths), outer, 1))
        self.ese = EffectiveSqueezeExcitation(outer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) to (B, outer, h, w)."""
        features = [x]
        for layer in self.layers:
            features.append(layer(features[-1]))
        out = self.ese(self.concat(torch.cat(features, dim=1)))
        return out + x if self.identity else out


@MODELS.register_module()
class VoVNet(BaseModule):
    """VoVNet backbone whose batch norms are frozen: no affine training, always in evaluation mode.

    Args:
        spec_name: Key of :data:`SPECS`.
        out_features: Stages to return, among ``stage2`` (stride 4) to ``stage5`` (stride 32).

    Raises:
        ValueError: An unknown variant or stage.
    """

    def __init__(
        self,
        spec_name: str = "V-99-eSE",
        out_features: Sequence[str] = ("stage4", "stage5"),
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg or {"type": "Kaiming", "layer": "Conv2d"})
        if spec_name not in SPECS:
            raise ValueError(f"unknown VoVNet spec_name={spec_name!r}; known: {', '.join(SPECS)}")
        stages = [f"stage{i}" for i in range(2, 6)]
        unknown = set(out_features) - set(stages)
        if unknown:
            raise ValueError(f"unknown VoVNet out_features {sorted(unknown)}; known: {', '.join(stages)}")
        self.out_features = tuple(out_features)
        spec = SPECS[spec_name]
        stem: OrderedDict[str, nn.Module] = OrderedDict()
        channels = 3
        for i, (width, stride) in enumerate(zip(spec.stem, (2, 1, 2)), start=1):
            stem |= _conv_norm_relu(f"stem_{i}", channels, width, 3, stride)
            channels = width
        self.stem = nn.Sequential(stem)
        for number, inner, outer, num_blocks in zip(range(2, 6), spec.inner, spec.outer, spec.blocks):
            stage: OrderedDict[str, nn.Module] = OrderedDict()
            if number > 2:
                stage["Pooling"] = nn.MaxPool2d(3, 2, ceil_mode=True)
            for block in range(num_blocks):
                name = f"OSA{number}_{block + 1}"
                identity = block > 0
                stage[name] = OneShotAggregation(name, channels, inner, outer, spec.convs_per_block, identity)
                channels = outer
            self.add_module(f"stage{number}", nn.Sequential(stage))

    def train(self, mode: bool = True) -> VoVNet:
        """Switch the mode; batch norms stay in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) to one feature map per requested stage, finest first."""
        x = self.stem(x)
        outputs = []
        for number in range(2, 6):
            x = self.get_submodule(f"stage{number}")(x)
            if f"stage{number}" in self.out_features:
                outputs.append(x)
        return tuple(outputs)
