"""The mmcv wheel that `make setup` builds computes what its operators are defined to.

mmdet, mmdet3d and the detector import these on a CPU; each is held against torchvision, a plain convolution or geometry
that can be done by hand.
"""

from __future__ import annotations

import ast
import importlib
import math
from pathlib import Path

import pytest
import torch
import torchvision
from mmcv import ops
from torch.nn import functional


def used_operators() -> list[str]:
    """Names that mmdet, mmdet3d and the detector import from ``mmcv.ops``."""
    import mmdet
    import mmdet3d

    root = Path(__file__).resolve().parents[1]
    names = set()
    for folder in (Path(mmdet.__file__).parent, Path(mmdet3d.__file__).parent, root / "projects"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmcv.ops"):
                    names |= {(node.module, alias.name) for alias in node.names}
    return sorted(f"{module}:{name}" for module, name in names)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def boxes(generator) -> torch.Tensor:
    corners = torch.rand(60, 2, generator=generator) * 80
    return torch.cat([corners, corners + 5 + torch.rand(60, 2, generator=generator) * 30], dim=1)


def test_every_operator_that_upstream_imports_is_there():
    used = used_operators()
    assert len(used) > 40
    missing = [
        place
        for place in used
        if not hasattr(importlib.import_module(place.partition(":")[0]), place.partition(":")[2])
    ]
    assert not missing


def test_nms_keeps_what_torchvision_keeps(boxes, generator):
    scores = torch.rand(60, generator=generator)
    kept = ops.nms(boxes, scores, 0.5)[1]
    assert kept.tolist() == torchvision.ops.nms(boxes, scores, 0.5).tolist()
    assert 10 < len(kept) < 60
    labels = torch.arange(60) % 3
    kept = ops.batched_nms(boxes, scores, labels, dict(type="nms", iou_threshold=0.5))[1]
    assert sorted(kept.tolist()) == sorted(torchvision.ops.batched_nms(boxes, scores, labels, 0.5).tolist())


def test_rotated_iou_of_upright_boxes_is_the_plain_one(boxes):
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    sizes = boxes[:, 2:] - boxes[:, :2]
    rotated = torch.cat([centres, sizes, torch.zeros(60, 1)], dim=1)
    torch.testing.assert_close(
        ops.box_iou_rotated(rotated, rotated), torchvision.ops.box_iou(boxes, boxes), atol=1e-5, rtol=1e-4
    )


def test_a_square_turned_by_45_degrees_overlaps_itself_by_its_octagon():
    square = torch.tensor([[0.0, 0.0, 2.0, 2.0, 0.0]])
    turned = torch.tensor([[0.0, 0.0, 2.0, 2.0, math.pi / 4]])
    octagon = 8 * (math.sqrt(2) - 1)
    expected = octagon / (8 - octagon)
    assert ops.box_iou_rotated(square, turned).item() == pytest.approx(expected, rel=1e-5)
    kept = ops.nms_rotated(torch.cat([square, turned]), torch.tensor([0.9, 0.8]), expected - 0.01)[1]
    assert kept.tolist() == [0]
    kept = ops.nms_rotated(torch.cat([square, turned]), torch.tensor([0.9, 0.8]), expected + 0.01)[1]
    assert kept.tolist() == [0, 1]


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convolution_without_offset_is_a_convolution(generator, modulated):
    x = torch.randn(2, 6, 9, 11, generator=generator)
    weight = torch.randn(8, 6, 3, 3, generator=generator)
    offset = torch.zeros(2, 18, 9, 11)
    expected = functional.conv2d(x, weight, padding=1)
    if modulated:
        mask = torch.full((2, 9, 9, 11), 0.5)
        found, expected = ops.modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1, 1, 1, 1), expected / 2
    else:
        found = ops.deform_conv2d(x, offset, weight, 1, 1, 1, 1, 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_deformable_convolution_moves_by_its_offset(generator):
    x = torch.randn(1, 3, 8, 8, generator=generator)
    weight = torch.randn(4, 3, 1, 1, generator=generator)
    offset = torch.zeros(1, 2, 8, 8)
    offset[:, 1] = 1  # one pixel to the right
    found = ops.deform_conv2d(x, offset, weight, 1, 0, 1, 1, 1)
    torch.testing.assert_close(found[..., :-1], functional.conv2d(x[..., 1:], weight), atol=1e-5, rtol=1e-5)


def test_region_features_are_those_of_torchvision(generator):
    x = torch.randn(2, 5, 20, 24, generator=generator)
    regions = torch.tensor([[0, 2.0, 3.0, 12.5, 15.0], [1, 0.0, 1.0, 20.0, 9.0]])
    torch.testing.assert_close(
        ops.roi_align(x, regions, (7, 7), 0.5, 2, "avg", True),
        torchvision.ops.roi_align(x, regions, (7, 7), 0.5, 2, True),
    )


def test_hard_voxels_hold_the_points_of_their_cell(generator):
    points = torch.rand(500, 4, generator=generator) * torch.tensor([8.0, 8.0, 2.0, 1.0])
    layer = ops.Voxelization([2.0, 2.0, 2.0], [0, 0, 0, 8, 8, 2], max_num_points=100, max_voxels=50)
    voxels, cells, counts = layer(points)
    assert int(counts.sum()) == 500
    for voxel, cell, count in zip(voxels, cells, counts.tolist()):
        found = (voxel[:count, :3] / 2).floor().long()
        assert torch.equal(found, cell.flip(0).long().expand_as(found))


def test_points_in_a_turned_box_are_found():
    box = torch.tensor([[[0.0, 0.0, 0.0, 4.0, 2.0, 2.0, math.pi / 2]]])  # length 4 now lies along y
    points = torch.tensor([[[0.0, 1.8, 1.0], [1.8, 0.0, 1.0], [0.0, 0.0, 2.5]]])
    assert ops.points_in_boxes_cpu(points, box)[0, :, 0].tolist() == [1, 0, 0]


def test_deformable_attention_at_one_place_reads_that_pixel(generator):
    shapes = torch.tensor([[4, 6]])
    value = torch.randn(1, 24, 2, 3, generator=generator)  # batch, pixels, heads, channels
    centre = torch.tensor([(2 + 0.5) / 6, (1 + 0.5) / 4])  # column 2, row 1
    places = centre.expand(1, 1, 2, 1, 1, 2)
    weights = torch.ones(1, 1, 2, 1, 1)
    found = ops.multi_scale_deform_attn.multi_scale_deformable_attn_pytorch(value, shapes, places, weights)
    torch.testing.assert_close(found[0, 0], value[0, 1 * 6 + 2].flatten(), atol=1e-5, rtol=1e-5)
