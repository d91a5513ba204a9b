"""Heads of attention within windows and of deformable attention are cut; what is left equals the masked model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.models.backbones.swin import SwinTransformer
from mmengine.config import Config
from torch import Tensor, nn

from mdp_mmdet3d.adapters import InputShape
from mdp_mmdet3d.adapters.single_graph import SingleGraph
from mdp_mmdet3d.latency.graphs import operator_graph
from mdp_mmdet3d.layers import WindowAttention
from mdp_mmdet3d.operators import OPERATORS
from mdp_mmdet3d.space.builder import SpaceOptions
from mdp_mmdet3d.space.types import DimensionKind
from mdp_mmdet3d.surgery.apply import apply_plan, shared_copy
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = SwinTransformer(
            embed_dims=16, depths=(2, 2), num_heads=(2, 4), window_size=4, strides=(4, 2), out_indices=(1,), mlp_ratio=2
        )
        self.head = nn.Conv2d(32, 3, 1)

    def forward(self, inputs: Tensor, data_samples=None, mode: str = "tensor") -> tuple[Tensor]:
        return (self.head(self.backbone(inputs)[0]),)


class Deformable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.attn = MultiScaleDeformableAttention(32, num_heads=4, num_levels=1, num_points=2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 3)

    def forward(self, inputs: Tensor, data_samples=None, mode: str = "tensor") -> tuple[Tensor]:
        maps = self.patches(inputs)
        size = maps.shape[-2:]
        x = maps.flatten(2).transpose(1, 2)
        places = torch.stack(
            torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in reversed(size)), indexing="xy"), dim=-1
        ).reshape(1, -1, 1, 2)
        shapes = torch.tensor([list(size)])
        x = self.attn(
            x,
            value=x,
            reference_points=places,
            spatial_shapes=shapes,
            level_start_index=torch.zeros(1, dtype=torch.long),
        )
        return (self.head(self.norm(x)),)


def _random(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.2)
    return model.eval()


@pytest.mark.parametrize("kind, blocks", [(Swin, 8), (Deformable, 1)])
def test_heads_are_cut(kind, blocks):
    torch.manual_seed(0)
    model = _random(kind())
    space = SingleGraph(Config({}), InputShape(1, 64, 64)).trace(model, SpaceOptions(4, 4, 4))
    heads = [d for d in space.dimensions if d.kind is DimensionKind.HEADS]
    assert len(heads) == (4 if kind is Swin else 1) and len(space.blocks) == blocks, space.not_prunable
    assert not any("verification" in n.reason for n in space.not_prunable)
    rng, image = np.random.default_rng(0), torch.randn(1, 3, 64, 64)
    for _ in range(2):
        kept = {
            d.name: tuple(
                tuple(sorted(rng.choice(d.size, count, replace=False).tolist()))
                for count in [int(rng.choice(d.options[:-1]))] * d.copies
            )
            for d in space.dimensions
        }
        plan = PruningPlan.from_kept(space, kept, {space.blocks[-1].name})
        pruned = apply_plan(shared_copy(model), plan)
        with torch.no_grad():
            found, expected = pruned(image)[0], mask_model(shared_copy(model), plan)(image)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert kind is Deformable or any(isinstance(m, WindowAttention) for m in pruned.modules())


def test_windows_have_a_price():
    model = _random(Swin())
    space = SingleGraph(Config({}), InputShape(1, 64, 64)).trace(model, SpaceOptions(4, 4, 4))
    term = next(t for t in space.terms if t.name == "backbone.stages.0.blocks.0.attn.w_msa")
    assert (term.signature["windows"], term.signature["queries"]) == (16, 16)
    work = OPERATORS["attention"].work(term.signature, (2, 8, 8))
    assert work.macs == 16 * 16 * (4 * 16 * 16 + 2 * 16 * 16)  # four projections, two products
    graph = operator_graph(term.signature, (1, 8, 4))
    assert graph.inputs == {"queries": (16, 16, 16)}
