"""Vision transformers through the single-graph adapter: attention, feed-forward networks, sub-layers, layers."""

from __future__ import annotations

import copy

import numpy as np
import onnxruntime as ort
import pytest
import torch
from mmengine.config import Config
from torch import nn

from mdp_mmdet3d.adapters import InputShape, adapter_of
from mdp_mmdet3d.adapters.attentions import find_attentions
from mdp_mmdet3d.adapters.single_graph_export import TensorMode, export_single_graph
from mdp_mmdet3d.adapters.transformer_layers import _role, add_transformer_layers
from mdp_mmdet3d.layers import PackedSelfAttention, RemovedBranch, RemovedSubLayer, widened
from mdp_mmdet3d.space.builder import SpaceBuilder, SpaceOptions
from mdp_mmdet3d.space.calls import Call, record_calls
from mdp_mmdet3d.space.conv import add_conv_dimensions
from mdp_mmdet3d.space.types import BlockKind, DimensionKind
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan

pytest.importorskip("mmpretrain")
SIZE = (32, 32)
LAYER = "backbone.layers.1"


def config(**backbone):
    arch = dict(embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=64)
    return Config(
        dict(
            default_scope="mmpretrain",
            model=dict(
                type="ImageClassifier",
                backbone=dict(type="VisionTransformer", arch=arch, img_size=32, patch_size=8, **backbone),
                head=dict(
                    type="VisionTransformerClsHead",
                    num_classes=5,
                    in_channels=32,
                    init_cfg=dict(type="TruncNormal", layer="Linear", std=0.5),
                ),
            ),
        )
    )


def trace(**backbone):
    adapter = adapter_of(config(**backbone), InputShape(0, *SIZE))
    model, _ = adapter.build(None)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():  # shipped initialisers leave biases and FFN outputs at nearly 0
        if parameter.ndim and "gamma" not in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, adapter.trace(model, SpaceOptions(4, 8, 2, 0.0, ()))


@pytest.fixture(scope="module")
def traced():
    return trace()


def outputs(model, seed=0):
    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return TensorMode(model.eval(), SIZE)(image)[0]


def test_all_parts_of_a_layer_are_found(traced):
    _, space = traced
    kinds = {block.name: (block.kind, block.parent) for block in space.blocks}
    assert kinds[LAYER] == (BlockKind.LAYER, None)
    assert kinds[f"{LAYER}.attn"] == (BlockKind.BRANCH, LAYER)
    assert kinds[f"{LAYER}.ffn"] == (BlockKind.SUB_LAYER, LAYER)
    assert len(kinds) == 9
    found = {d.name: (d.kind, d.size) for d in space.dimensions if d.name.startswith(LAYER)}
    assert found == {
        f"{LAYER}.attn.heads": (DimensionKind.HEADS, 4),
        f"{LAYER}.attn.qk": (DimensionKind.QK_WIDTH, 8),
        f"{LAYER}.attn.v": (DimensionKind.V_WIDTH, 8),
        f"{LAYER}.ffn.layers.0.0.out": (DimensionKind.HIDDEN, 64),
    }
    assert {t.signature.kind for t in space.terms} == {"attention", "ffn"} and len(space.terms) == 6
    ffn = next(t for t in space.terms if t.signature.kind == "ffn")
    assert ffn.signature["activation"] == "gelu" and ffn.signature["tokens"] == 17


@pytest.mark.parametrize("seed", range(4))
def test_random_plans_equal_the_masked_model(traced, random_kept, seed):
    model, space = traced
    plan = PruningPlan.from_kept(space, *random_kept(space, np.random.default_rng(seed), 0.3))
    pruned, masked = (f(copy.deepcopy(model), plan) for f in (apply_plan, mask_model))
    torch.testing.assert_close(outputs(pruned), outputs(masked), rtol=1e-4, atol=1e-4)
    assert {name for name, _ in pruned.named_parameters()} <= {name for name, _ in model.named_parameters()}


def test_a_pruned_transformer_exports_as_it_computes(traced, random_kept, tmp_path):
    model, space = traced
    kept, _ = random_kept(space, np.random.default_rng(5), 0.0)
    plan = PruningPlan.from_kept(space, kept, {f"{LAYER}.attn", "backbone.layers.2.ffn"})
    assert {DimensionKind.V_WIDTH, DimensionKind.QK_WIDTH} & {cut.kind for cut in plan.cuts.values()}
    pruned = apply_plan(copy.deepcopy(model), plan)
    export_single_graph(pruned, tmp_path / "out", input_size=SIZE)
    image = np.random.default_rng(0).standard_normal((1, 3, *SIZE), dtype=np.float32)
    session = ort.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: image})
    with torch.no_grad():
        (expected,) = TensorMode(pruned.eval(), SIZE)(torch.from_numpy(image))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_layer_scale_and_drop_path_change_nothing():
    _, space = trace(layer_scale_init_value=0.5, drop_path_rate=0.1)
    assert len(space.blocks) == 9


def test_an_activation_in_place_is_found_and_a_layer_that_was_given_zeros_is_no_feed_forward(random_kept):
    """DETR's: ReLUs in place, and a first decoder layer whose input is 0."""
    model, space = trace(layer_cfgs=dict(act_cfg=dict(type="ReLU", inplace=True)))
    assert sum(term.signature.kind == "ffn" for term in space.terms) == 3
    assert sum(dimension.kind == DimensionKind.HIDDEN for dimension in space.dimensions) == 3
    plan = PruningPlan.from_kept(space, *random_kept(space, np.random.default_rng(0), 0.3))
    pruned, masked = (f(copy.deepcopy(model), plan) for f in (apply_plan, mask_model))
    torch.testing.assert_close(outputs(pruned), outputs(masked), rtol=1e-4, atol=1e-4)
    ffn = model.get_submodule(f"{LAYER}.ffn")
    for image, expected in ((torch.ones(1, 3, 32), BlockKind.SUB_LAYER), (torch.zeros(1, 3, 32), None)):
        assert _role(Call("", ffn, image, image, 0, 1), "layers.1") == expected


def test_an_attention_that_computes_more_is_left_alone_with_the_reason():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            return widened(self)(x) * 0.5

    net = nn.Sequential(Gated())
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    builder = SpaceBuilder(net, SpaceOptions())
    assert find_attentions(builder, net, lambda: net(x), {"0.qkv": [(1, 5, 8)]}) == []
    assert "more than a plain attention" in builder.left_alone["0"]


@pytest.mark.parametrize("convolutions", [True, False])
def test_a_gate_that_is_called_attention_is_left_alone_only_where_nothing_of_it_is_cut(convolutions):
    class ChannelAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Conv2d(32, 32, 1) if convolutions else nn.Parameter(torch.ones(32, 1, 1))

        def forward(self, x):
            means = x.mean((2, 3), keepdim=True)
            return x * (self.fc(means) if convolutions else self.fc * means).sigmoid()

    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), ChannelAttention(), nn.Conv2d(32, 4, 3)).eval()
    builder = SpaceBuilder(net, SpaceOptions())
    if convolutions:
        add_conv_dimensions(builder, net)
    assert find_attentions(builder, net, lambda: net(torch.randn(1, 3, 16, 16)), {}) == []
    assert ("2" in builder.left_alone) is not convolutions


def test_a_width_that_two_linear_layers_read_is_cut_in_both():
    class Modulation(nn.Module):
        def __init__(self):
            super().__init__()
            self.reduce, self.relu = nn.Linear(8, 32), nn.ReLU()
            self.gamma, self.beta = nn.Linear(32, 8), nn.Linear(32, 8)

        def forward(self, x):
            hidden = self.relu(self.reduce(x))
            return self.gamma(hidden) * x + self.beta(hidden)

    net = nn.Sequential(Modulation())
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    builder = SpaceBuilder(net, SpaceOptions())
    add_transformer_layers(builder, record_calls(net, lambda: net(x)), [], {}, "model")
    members = {m.tensor for m in builder.dimensions["0.reduce.out"].members}
    assert members == {"0.reduce.weight", "0.reduce.bias", "0.gamma.weight", "0.beta.weight"}


def test_what_stands_for_a_removed_block_takes_the_same_call():
    x, other = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    assert RemovedSubLayer()(x) is x
    assert RemovedSubLayer()(x, identity=other) is other
    assert RemovedSubLayer()(query=x, key=other, value=other) is x
    assert torch.equal(x + RemovedBranch()(x), x) and torch.equal(x + RemovedBranch()(query=x), x)


def test_widths_are_constructor_arguments():
    layer = PackedSelfAttention(nn.Linear(6, 2 * (2 * 3 + 5)), nn.Linear(10, 6), 2, 3, 5, 0.5)
    assert layer(torch.randn(2, 4, 6)).shape == (2, 4, 6)
