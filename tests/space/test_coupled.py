"""Groups found with an index are those that torch-pruning finds without one."""

from __future__ import annotations

import torch
import torch_pruning as tp
from torch import nn

from mdp_mmdet3d.space import coupled
from mdp_mmdet3d.space.builder import SpaceBuilder, SpaceOptions
from mdp_mmdet3d.space.conv import add_conv_dimensions
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


class InPlace(nn.Module):
    """Writes slices of its output in place, as FCOS3D's head does."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 9, 1)

    def forward(self, image):
        boxes = self.out(self.hidden(image).relu()).clone()
        boxes[:, 3:6] = boxes.clone()[:, 3:6].exp()
        return boxes


def test_slices_written_in_place_end_and_stay_outputs():
    model = InPlace().eval()
    builder = SpaceBuilder(model, SpaceOptions(channel_multiple=2))
    add_conv_dimensions(builder, model, 3, size=(8, 8), outputs_are_read=False)
    assert "out" in {name.partition(".")[0] for name in builder.left_alone}


def test_a_group_that_goes_in_circles_is_named(monkeypatch):
    monkeypatch.setattr(coupled, "TURNS", 2)
    model = SharedTower().eval()
    with indexed_groups() as circular:
        groups(model)
    assert circular <= set(model.modules())
    assert circular


def test_torch_pruning_is_left_as_it_was():
    before = tp.dependency.graph.Group
    with indexed_groups():
        assert issubclass(tp.dependency.graph.Group, IndexedGroup)
    assert tp.dependency.graph.Group is before
