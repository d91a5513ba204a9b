"""Blocks with a layer scale, feed-forward networks of any activation, convolutions that pad by themselves."""

from __future__ import annotations

import copy

import numpy as np
import onnxruntime as ort
import pytest
import torch
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from mmengine.config import Config
from torch import nn

from mdp_mmdet3d.adapters import InputShape, adapter_of
from mdp_mmdet3d.adapters.residual_blocks import find_residual_blocks
from mdp_mmdet3d.adapters.single_graph_export import TensorMode, export_single_graph
from mdp_mmdet3d.space.builder import SpaceOptions
from mdp_mmdet3d.space.calls import record_calls
from mdp_mmdet3d.space.conv import conv_geometry
from mdp_mmdet3d.space.types import BlockKind, DimensionKind
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan

from ..numerics import assert_close

pytest.importorskip("mmpretrain")
from mmpretrain.models.utils import SELayer

SIZE = (64, 64)
CONVNEXT = dict(type="ConvNeXt", arch=dict(depths=[1, 2, 1, 1], channels=[16, 24, 32, 40]), gap_before_final_norm=True)
POOLFORMER = dict(
    type="PoolFormer",
    arch=dict(layers=[1, 1, 1, 1], embed_dims=[16, 24, 32, 40], mlp_ratios=[4, 4, 4, 4], layer_scale_init_value=1e-5),
)
EFFICIENTNET = dict(type="EfficientNet", arch="b0", out_indices=(3,))


def traced(backbone, width, noise=0.3):
    model = dict(
        type="ImageClassifier",
        backbone=backbone,
        neck=None if backbone is CONVNEXT else dict(type="GlobalAveragePooling"),
        head=dict(type="LinearClsHead", num_classes=5, in_channels=width),
    )
    adapter = adapter_of(Config(dict(default_scope="mmpretrain", model=model)), InputShape(0, *SIZE))
    built, _ = adapter.build(None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():  # layer scales and biases start at nearly 0
            if parameter.ndim <= 3:
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return built, adapter.trace(built, SpaceOptions(4, 8, 2, 0.0, ()))


def outputs(model):
    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return TensorMode(model.eval(), SIZE)(image)[0]


def check(model, space, folder):
    """A random plan: pruned == masked, and exported."""
    rng = np.random.default_rng(0)
    kept = {
        d.name: (tuple(sorted(rng.permutation(d.size)[: d.options[0]].tolist())),) * d.copies for d in space.dimensions
    }
    removed = frozenset(b.name for b in space.blocks[::3])
    plan = PruningPlan.from_kept(space, kept, removed)
    pruned = apply_plan(copy.deepcopy(model), plan)
    expected = outputs(mask_model(copy.deepcopy(model), plan))
    assert_close(outputs(pruned), expected)
    export_single_graph(
        pruned, folder, input_size=SIZE, num_cams=1, class_names=(), plan_hash=plan.hash, weights="random"
    )
    session = ort.InferenceSession(str(folder / "model.onnx"))
    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0)).numpy()
    (found,) = session.run(None, {session.get_inputs()[0].name: image})
    assert_close(torch.from_numpy(found), expected)


def test_convnext_loses_hidden_widths_and_whole_blocks(tmp_path):
    model, space = traced(CONVNEXT, 40)
    blocks = {b.name: (b.kind, b.last) for b in space.blocks}
    every = [f"backbone.stages.{stage}.{i}" for stage, count in enumerate((1, 2, 1, 1)) for i in range(count)]
    assert blocks == {name: (BlockKind.IDENTITY, "pointwise_conv2") for name in every}
    hidden = {d.name: d.size for d in space.dimensions if d.kind is DimensionKind.HIDDEN}
    assert hidden == {f"{name}.pointwise_conv1.out": 4 * c for name, c in zip(every, (16, 24, 24, 32, 40), strict=True)}
    activations = {t.name for t in space.terms if t.signature.kind == "call" and "gelu" in str(t.signature)}
    assert len(activations) == 5  # priced with the width that they run on
    check(model, space, tmp_path / "out")


def test_poolformer_loses_hidden_widths(tmp_path):
    model, space = traced(POOLFORMER, 40)
    assert {d.name for d in space.dimensions} == {f"backbone.network.{i}.0.mlp.fc1.out" for i in (0, 2, 4, 6)}
    reasons = {n.reason for n in space.not_prunable}
    assert not space.blocks  # the pooling is added to the stream as well
    assert any("coupled with the parameter" in reason and "layer_scale" in reason for reason in reasons)
    check(model, space, tmp_path / "out")


def test_a_scale_of_nearly_zero_hides_no_second_branch():
    """With the shipped scales of 1e-5 a block of PoolFormer without its MLP returns its input, up to rounding."""
    _, space = traced(POOLFORMER, 40, noise=0.0)
    assert not space.blocks


def test_convolutions_that_pad_as_tensorflow_does_are_cut(tmp_path):
    model, space = traced(EFFICIENTNET, 40)
    assert sum(isinstance(m, Conv2dAdaptivePadding) for m in model.modules()) > 10
    assert len(space.dimensions) > 4 and not any("plain convolution" in n.reason for n in space.not_prunable)
    check(model, space, tmp_path / "out")


def test_the_price_of_one_is_that_of_half_the_kernel_on_each_side():
    geometry = conv_geometry(Conv2dAdaptivePadding(8, 8, 5, stride=2))
    assert (geometry.kernel, geometry.stride, geometry.padding) == ((5, 5), (2, 2), (2, 2))
    assert conv_geometry(Conv2dAdaptivePadding(8, 8, 1)).padding == (0, 0)


class Gated(nn.Module):
    """A block of an SE-ResNet: the gate stands between the branch and the addition."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.gate = SELayer(16, ratio=4)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(x + self.gate(self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))))


def test_a_gate_behind_the_branch_is_no_end_of_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), Gated())
    calls = record_calls(net, lambda: net(torch.randn(1, 3, 16, 16)))
    found, doubtful = find_residual_blocks(calls)
    assert [(b.name, b.kind, b.silent, b.conv) for b in found] == [("2", BlockKind.IDENTITY, "norm2", "")]
    assert not doubtful
