"""Small networks of every kind of layer, and plans that cut them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdp_mmdet3d.space.types import Block, DimensionKind, TensorAxis
from mdp_mmdet3d.surgery.apply import apply_plan, model_digest
from mdp_mmdet3d.surgery.plan import Cut, PruningPlan
from mdp_mmdet3d.surgery.repair import Frame, RepairSettings, WeightedFrame

PRECISE = RepairSettings(ridge=1e-7)
"""Nearly no ridge: what can be restored is restored."""


def plan_of(model: nn.Module, cuts: dict[str, tuple[Sequence[int], int, Sequence[TensorAxis]]], *removed: Block):
    """A plan from (kept elements, dense size, members) per dimension."""
    made = {
        name: Cut(DimensionKind.CHANNELS, size, (tuple(kept),), tuple(members))
        for name, (kept, size, members) in cuts.items()
    }
    return PruningPlan(model_digest(model), made, {block.name: block for block in removed})


def axes(*members: tuple[str, int]) -> tuple[TensorAxis, ...]:
    return tuple(TensorAxis(tensor, axis) for tensor, axis in members)


def cut(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A pruned copy."""
    return apply_plan(copy.deepcopy(model), plan).eval()


def frames_of(inputs: Sequence[Tensor]) -> list[Frame]:
    """Frames that call the model with one tensor."""

    def frame(x: Tensor) -> Frame:
        return lambda model: model(x)

    return [frame(x) for x in inputs]


def error(dense: nn.Module, pruned: nn.Module, x: Tensor) -> float:
    """Relative error of the outputs."""
    with torch.no_grad():
        expected = dense(x)
        return float((pruned(x) - expected).norm() / expected.norm())


def depend(weight: Tensor, bias: Tensor | None, axis: int = 0) -> None:
    """Make the last half of the outputs linear combinations of the first."""
    with torch.no_grad():
        half = weight.shape[axis] // 2
        mixing = torch.randn(half, half) / half**0.5
        first = weight.narrow(axis, 0, half).movedim(axis, 0)
        weight.narrow(axis, half, half).copy_((mixing @ first.flatten(1)).view_as(first).movedim(0, axis))
        if bias is not None:
            bias[half:] = mixing @ bias[:half]


class Attention(nn.Module):
    """Packed self-attention with separate modules, as transformers of images have it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.num_heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        weights = (q @ k.mT * self.head_dim**-0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Residual(nn.Module):
    """x + conv(x), then an activation in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        out += x
        return self.relu(out)


class Shared(nn.Module):
    """A tower that runs on two levels, in order level by level."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.tower = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.norm(self.stem(x)).relu()
        coarse = F.max_pool2d(fine, 2)
        return torch.cat([self.tower(level).flatten(2) for level in (fine, coarse)], dim=2)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and gains that are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    return model.eval()


MEMBERS = axes(*((f"0.{t}", 0) for t in ("weight",)), *((f"1.{t}", 0) for t in ("weight", "bias", "running_mean",
               "running_var")), ("3.weight", 1))  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise(
        nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(inplace=True),
            nn.Conv2d(12, 8, 3, padding=1),
            nn.Sequential(Residual(8), Residual(8)),
            nn.Conv2d(8, 5, 1),
        )
    )


def setting():
    """A dense model, a plan, frames and an image of its own."""
    model = network()
    plan = plan_of(model, {"0.out": ([0, 1, 3, 4, 6, 9, 10, 11], 12, MEMBERS)})
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, 3, 10, 10, generator=generator) for _ in range(9)]
    return model, plan, frames_of(inputs[:8]), inputs[8]


def weighted(frames: Sequence[Frame]) -> list[Frame]:
    """Those of `setting`, of which some positions of the images count more than others."""
    generator = torch.Generator().manual_seed(2)
    return [WeightedFrame(frame, torch.rand(2, 10, 10, generator=generator) + 0.01) for frame in frames]


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
