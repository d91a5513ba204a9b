"""Groups found with an index are those that torch-pruning finds without one."""

from __future__ import annotations

import torch
import torch_pruning as tp
from torch import nn

from mdp_mmdet3d.space.coupled import IndexedGroup, indexed_groups


class SharedTower(nn.Module):
    """Two levels through one tower, concatenated, split and added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, padding=1)
        self.tower = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU())
        self.joined = nn.Conv2d(16, 6, 1)
        self.out = nn.Conv2d(3, 2, 1)

    def forward(self, image):
        x = self.stem(image)
        low, high = self.tower(x), self.tower(self.down(x))
        first, second = self.joined(torch.cat((low, high + x), dim=1)).chunk(2, dim=1)
        return self.out(first + second)


def groups(model):
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=torch.zeros(1, 3, 8, 8))
    names = {module: name for name, module in model.named_modules()}
    return [
        [(names.get(i.dep.target.module), i.dep.handler.__name__, i.idxs, i.root_idxs) for i in group]
        for group in graph.get_all_groups()
    ]


def test_the_same_groups_with_an_index():
    model = SharedTower().eval()
    expected = groups(model)
    with indexed_groups():
        assert groups(model) == expected
    assert len(expected) > 1
    assert max(len(group) for group in expected) > 8


def test_torch_pruning_is_left_as_it_was():
    before = tp.dependency.graph.Group
    with indexed_groups():
        assert tp.dependency.graph.Group is IndexedGroup
    assert tp.dependency.graph.Group is before
