"""A small network with everything that values have to count: shared and private widths, blocks, blocks in blocks."""

from __future__ import annotations

import torch
from torch import nn

from mdp_mmdet3d.space.builder import SpaceBuilder, SpaceOptions
from mdp_mmdet3d.space.types import BlockKind, DimensionKind, TensorAxis


class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


class SubLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.last(self.first(x).relu())


class Net(nn.Module):
    """Two bottlenecks, then a layer of two sub-layers; the loss is that of a regression."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Bottleneck(), Bottleneck())
        self.layer = nn.Sequential(SubLayer(), SubLayer())
        self.head = nn.Linear(8, 1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)

    def forward(self, x):
        x = self.blocks(self.norm(self.stem(x)).relu())
        return self.head(self.layer(x.mean(dim=(2, 3))))


def losses(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def batches(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        found.append({"x": x, "y": x.mean(dim=(1, 2, 3))[:, None] * 8})
    return found


def trained(steps: int = 150) -> Net:
    """A net that has learned something, so that its parts are worth something."""
    net = Net().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for batch in batches(steps, seed=1):
        optimizer.zero_grad()
        losses(net, batch).backward()
        optimizer.step()
    return net.eval()


def net_space(net: Net):
    """Widths in blocks of 4, the bottlenecks, the sub-layers and their layer."""
    builder = SpaceBuilder(net, SpaceOptions(channel_multiple=4))
    for i in range(2):
        builder.add_block(f"blocks.{i}", BlockKind.IDENTITY, last="bn2")
    builder.add_block("layer", BlockKind.LAYER)
    for i in range(2):
        builder.add_block(f"layer.{i}", BlockKind.SUB_LAYER, "layer", last="last")
    for i in range(2):
        norm = [TensorAxis(f"blocks.{i}.bn1.{leaf}", 0) for leaf in ("weight", "bias")]
        statistics = [TensorAxis(f"blocks.{i}.bn1.{leaf}", 0) for leaf in ("running_mean", "running_var")]
        convs = [TensorAxis(f"blocks.{i}.conv1.weight", 0), TensorAxis(f"blocks.{i}.conv2.weight", 1)]
        builder.add_dimension(f"blocks.{i}.conv1.out", DimensionKind.CHANNELS, 16, [*norm, *statistics, *convs], [norm])
    for i in range(2):
        rows = [TensorAxis(f"layer.{i}.first.{leaf}", 0) for leaf in ("weight", "bias")]
        builder.add_dimension(
            f"layer.{i}.first.out", DimensionKind.HIDDEN, 16, [*rows, TensorAxis(f"layer.{i}.last.weight", 1)], [rows]
        )
    for name in builder.dimensions:
        builder.add_term(f"{name.removesuffix('.out')}", "head", "ffn", (name,), tokens=1, embed_dims=8)
    from mdp_mmdet3d.surgery.apply import model_digest

    return builder.finish("Net", model_digest(net))
