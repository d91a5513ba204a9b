"""Depthwise convolutions: one count in and out, priced as what they are, pruned equal to masked."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import nn

from mdp_mmdet3d.adapters import InputShape, adapter_of
from mdp_mmdet3d.adapters.single_graph_export import TensorMode
from mdp_mmdet3d.latency.graphs import operator_graph
from mdp_mmdet3d.operators import OPERATORS
from mdp_mmdet3d.space.builder import SpaceOptions
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan

pytest.importorskip("mmpretrain")
SIZE = (64, 64)


@pytest.fixture(scope="module")
def traced():
    config = Config(
        dict(
            default_scope="mmpretrain",
            model=dict(
                type="ImageClassifier",
                backbone=dict(type="MobileNetV2", widen_factor=0.5),
                neck=dict(type="GlobalAveragePooling"),
                head=dict(type="LinearClsHead", num_classes=4, in_channels=1280),
            ),
        )
    )
    adapter = adapter_of(config, InputShape(0, *SIZE))
    model, _ = adapter.build(None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            nn.init.normal_(module.bias, 0, 0.1)
    return model, adapter.trace(model, SpaceOptions(4, 8, 8, 0.0, ()))


def test_expanded_channels_are_one_dimension_with_three_terms(traced):
    _, space = traced
    (name,) = next(t.dimensions for t in space.terms if t.name == "backbone.layer3.1.conv.1.conv")
    terms = {t.name: t.signature.kind for t in space.terms if name in t.dimensions}
    assert terms == {
        "backbone.layer3.1.conv.0.conv": "conv",
        "backbone.layer3.1.conv.1.conv": "depthwise_conv",
        "backbone.layer3.1.conv.2.conv": "conv",
    }


@pytest.mark.parametrize("seed", range(2))
def test_random_plans_equal_the_masked_model(traced, random_kept, seed):
    model, space = traced
    plan = PruningPlan.from_kept(space, *random_kept(space, np.random.default_rng(seed), 0.2))
    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        pruned = TensorMode(apply_plan(copy.deepcopy(model), plan).eval(), SIZE)(image)[0]
        masked = TensorMode(mask_model(copy.deepcopy(model), plan).eval(), SIZE)(image)[0]
    torch.testing.assert_close(pruned, masked, rtol=1e-4, atol=1e-4 * float(masked.abs().max()))


def test_probe_work_and_call_are_those_of_the_convolution(traced):
    _, space = traced
    term = next(t for t in space.terms if t.signature.kind == "depthwise_conv")
    kind = OPERATORS["depthwise_conv"]
    node = next(n for n in operator_graph(term.signature, (24,)).model.graph.node if n.name == "target")
    assert next(a.i for a in node.attribute if a.name == "group") == 24
    call, inputs = kind.torch_call(term.signature, (24,))
    with torch.no_grad():
        out = call(*inputs)
    assert out.shape[1] == 24
    assert kind.work(term.signature, (24,)).macs == out.numel() * 9
