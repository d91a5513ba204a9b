"""Nothing is priced as something else: dimensions without cost are refused, unknown operators are left alone."""

import copy
import json

import numpy as np
import pytest
import torch
from mmdet.models.backbones.resnet import ResNet, ResNetV1d
from torch import nn

from mdp_mmdet3d.adapters.deployed_graph import DeployedGraph
from mdp_mmdet3d.adapters.graph_terms import add_graph_terms
from mdp_mmdet3d.adapters.residual_blocks import add_residual_branches
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.space import BlockKind, PruningSpace
from mdp_mmdet3d.space.builder import SpaceBuilder, SpaceOptions
from mdp_mmdet3d.space.conv import add_conv_dimensions
from mdp_mmdet3d.space.conv_terms import add_conv_term
from mdp_mmdet3d.space.mlp import add_hidden, add_mlp
from mdp_mmdet3d.surgery.apply import apply_plan, model_digest
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan


class Model(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone(x)


def trace(backbone):
    torch.manual_seed(0)
    model = Model(backbone).eval()
    builder = SpaceBuilder(model, SpaceOptions(channel_multiple=8))
    image = torch.randn(1, 3, 64, 96)
    graph = DeployedGraph("image_encoder", lambda m: m(image), lambda m: m(image))
    calls = graph.calls(model)
    blocks = add_residual_branches(builder, calls)
    add_conv_dimensions(builder, backbone)
    add_graph_terms(builder, model, graph, calls, graph.at_size(model), blocks)
    return model, builder.finish("Model", model_digest(model))


def add_linear_terms(builder):
    tokens = torch.randn(1, 2, 4)
    graph = DeployedGraph("head", lambda m: m(tokens), lambda m: m(tokens))
    add_graph_terms(builder, builder.model, graph, graph.calls(builder.model), graph.at_size(builder.model))


def resnet(depth=18, **options):
    return ResNet(depth, base_channels=16, num_stages=2, strides=(1, 2), dilations=options.pop("dilations", (1, 1)),
                  out_indices=(1,), **options)  # fmt: skip


def reasons(space):
    return {n.module: n.reason for n in space.not_prunable}


def assert_pruned_equals_masked(model, space, random_kept):
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.8, 1.2)
    for seed in range(3):
        kept, removed = random_kept(space, np.random.default_rng(seed), 0.3)
        plan = PruningPlan.from_kept(space, kept, removed)
        x = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            masked = mask_model(copy.deepcopy(model), plan)(x)
            pruned = apply_plan(copy.deepcopy(model), plan)(x)
        for a, b in zip(masked, pruned, strict=True):
            width = b.shape[1]
            assert width == a.shape[1] or a.abs().amax((0, 2, 3)).count_nonzero() <= width
            torch.testing.assert_close(a.abs().sum(), b.abs().sum(), rtol=1e-4, atol=1e-3)


def test_a_dimension_without_cost_is_refused_by_name():
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    builder = SpaceBuilder(net, SpaceOptions())
    add_hidden(builder, "0", ("2",), 32)
    with pytest.raises(MdpError, match=r"no cost term uses '0\.out'.*add_term.*leave"):
        builder.finish("mlp", "f")
    builder.leave("0.out", "for a reason")
    assert builder.finish("mlp", "f").dimensions == ()


def test_a_dimension_of_an_engine_that_runs_once_is_enough():
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    builder = SpaceBuilder(net, SpaceOptions())
    add_hidden(builder, "0", ("2",), 32)
    builder.add_term("0", "position_embedding", "linear", (4, "0.out"), tokens=2, norm="none", activation="relu")
    assert [d.name for d in builder.finish("mlp", "f").dimensions] == ["0.out"]


def test_leaving_a_dimension_keeps_the_dense_count_in_its_terms():
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    builder = SpaceBuilder(Model(net), SpaceOptions())
    add_mlp(builder, net, "backbone")
    add_linear_terms(builder)
    builder.leave("backbone.0.out", "for a reason")
    assert {t.name: t.widths for t in builder.finish("mlp", "f").terms} == {
        "backbone.2": (32, "backbone.2.out"),
        "backbone.4": ("backbone.2.out", 2),
    }


def test_norm_and_relu_are_part_of_their_linear_layer_and_another_activation_is_not():
    norm, bare = nn.LayerNorm(32), nn.LayerNorm(16, elementwise_affine=False)
    net = nn.Sequential(
        nn.Linear(4, 32),
        norm,
        nn.Dropout(),
        nn.ReLU(inplace=True),
        nn.Linear(32, 48),
        nn.GELU(),
        nn.Linear(48, 16),
        bare,
    )
    builder = SpaceBuilder(Model(net), SpaceOptions())
    add_mlp(builder, net, "backbone")
    add_linear_terms(builder)
    terms = {t.name: t for t in builder.finish("mlp", "f").terms}
    found = {n: (t.signature["norm"], t.signature["activation"]) for n, t in terms.items() if n != "backbone.5"}
    assert found == {"backbone.0": ("layer", "relu"), "backbone.4": ("none", "none"), "backbone.6": ("none", "none")}
    assert terms["backbone.5"].signature.kind == "call" and "gelu" in terms["backbone.5"].signature["call"]
    assert {m.tensor for m in builder.dimensions["backbone.0.out"].members} >= {
        "backbone.1.weight",
        "backbone.4.weight",
    }


def test_what_export_folds_costs_nothing():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.points, self.mlp = nn.Embedding(6, 4), nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4))

        def forward(self, x):
            return self.mlp(self.points.weight[None]).sum(1, keepdim=True) + self.mlp(x)

    builder = SpaceBuilder(Model(Queries()), SpaceOptions())
    add_mlp(builder, builder.model.backbone.mlp, "backbone.mlp")
    add_linear_terms(builder)
    assert {n: t.signature["tokens"] for n, t in builder.terms.items()} == {"backbone.mlp.0": 2, "backbone.mlp.2": 2}


def test_a_norm_without_weights_between_linear_layers_leaves_the_width_alone():
    net = nn.Sequential(nn.Linear(4, 32), nn.LayerNorm(32, elementwise_affine=False), nn.Linear(32, 2))
    builder = SpaceBuilder(Model(net), SpaceOptions())
    add_mlp(builder, net, "backbone")
    assert not builder.dimensions and "LayerNorm" in builder.left_alone["backbone.0.out"]


def test_dilation_strides_and_paddings_reach_the_cost_term():
    _, space = trace(resnet(dilations=(1, 2)))
    terms = {t.name: t.signature for t in space.terms}
    assert (terms["backbone.layer2.0.conv1"]["dilation_h"], terms["backbone.layer2.0.conv1"]["padding"]) == (2, 2)
    assert "dilation_h" not in dict(terms["backbone.layer1.0.conv1"].attributes)
    conv = nn.Conv2d(32, 32, (1, 3), stride=(1, 2), padding=(0, 1), dilation=(1, 2))
    net = nn.Sequential(conv, nn.Conv2d(32, 8, 1))
    builder = SpaceBuilder(Model(net), SpaceOptions())
    add_conv_dimensions(builder, net, in_channels=32)
    add_conv_term(builder, "backbone.0", conv, (1, 32, 8, 8), "e")
    signature = builder.terms["backbone.0"].signature
    assert [signature[n] for n in ("stride", "stride_w", "padding", "padding_w", "dilation_w")] == [1, 2, 0, 1, 2]


def odd_conv(**options):
    backbone = resnet()
    backbone.layer1[1].conv1 = nn.Conv2d(16, 16, 3, bias=False, **options)
    return backbone


def odd_norm(**options):
    backbone = resnet()
    backbone.layer1[1].bn1 = nn.BatchNorm2d(16, **options)
    return backbone


@pytest.mark.parametrize(
    "backbone, reason",
    [
        (lambda: odd_conv(padding="same"), "padding='same'"),
        (lambda: odd_conv(padding=1, padding_mode="reflect"), "pads with 'reflect'"),
        (lambda: odd_norm(affine=False), "without weight and bias"),
        (lambda: odd_norm(track_running_stats=False), "without running statistics"),
    ],
)
def test_one_operator_that_cannot_be_cut_leaves_its_channels(backbone, reason, random_kept):
    model, space = trace(backbone())
    left = reasons(space)
    assert reason in left["backbone.layer1.1.conv1.out"] and "backbone.layer1.1.conv1.out" not in space.by_name
    if "pad" in reason:
        assert "counts as fixed" in left["backbone.layer1.1.conv1"]
    assert "backbone.layer1.1" in space.blocks_by_name  # without its branch it is what it was
    assert "backbone.layer2.1.conv1.out" in space.by_name and "backbone.layer2.1" in space.blocks_by_name
    assert_pruned_equals_masked(model, space, random_kept)


def test_group_norm_loses_whole_groups_and_is_priced_by_its_call(random_kept):
    model, space = trace(resnet(norm_cfg=dict(type="GN", num_groups=4)))
    (norm,) = (t for t in space.terms if t.name == "backbone.layer1.0.gn1")
    assert (
        norm.block == "backbone.layer1.0" and norm.signature.kind == "call" and "group_norm" in norm.signature["call"]
    )
    inner = space.by_name["backbone.layer1.0.conv1.out"]
    assert (inner.size, inner.members[0].width) == (4, 4)
    assert_pruned_equals_masked(model, space, random_kept)


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(norm_cfg=dict(type="IN")), "InstanceNorm2d"),
        (dict(conv_cfg=dict(type="ConvWS")), "ConvWS2d"),
    ],
)
def test_other_norms_and_convolutions_leave_all_channels(options, reason, random_kept):
    model, space = trace(resnet(**options))
    assert space.dimensions == () and len(space.blocks) == 4
    assert all(reason in text for text in reasons(space).values())
    assert_pruned_equals_masked(model, space, random_kept)


@pytest.mark.parametrize("kind", ["DCN", "DCNv2"])
def test_deformable_convolutions_are_left_alone(kind, random_kept):
    dcn = dict(type=kind, deform_groups=1, fallback_on_stride=False)
    model, space = trace(resnet(50, dcn=dcn, stage_with_dcn=(False, True)))
    left = reasons(space)
    for block in range(4):
        path = f"backbone.layer2.{block}"
        assert f"{path}.conv1.out" in left
        assert not any(m.tensor.startswith(f"{path}.conv2") for d in space.dimensions for m in d.members)
    assert "backbone.layer1.0.conv1.out" in space.by_name
    assert_pruned_equals_masked(model, space, random_kept)


def test_synchronised_batch_norm_is_an_ordinary_one():
    _, space = trace(resnet(norm_cfg=dict(type="SyncBN")))
    assert space.dimensions == trace(resnet())[1].dimensions


def test_a_deep_stem_and_average_pooling_are_priced(random_kept):
    backbone = ResNetV1d(depth=18, base_channels=16, stem_channels=32, num_stages=2, strides=(1, 2), dilations=(1, 1),
                         out_indices=(1,))  # fmt: skip
    model, space = trace(backbone)
    assert reasons(space) == {}
    terms = {t.name: t.widths for t in space.terms}
    assert terms["backbone.stem.3"] == ("backbone.stem.0.out", "backbone.stem.3.out")
    assert terms["backbone.maxpool"] == ("backbone.stem.6.out",)
    shortcut = terms["backbone.layer2.0.downsample.1"]
    assert all(isinstance(width, str) for width in shortcut)
    assert terms["backbone.layer2.0.downsample.0"] == (shortcut[0],)
    assert_pruned_equals_masked(model, space, random_kept)


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d((3, 1), 2)]
)
def test_other_poolings_are_priced_by_their_call(pool):
    backbone = resnet()
    backbone.maxpool = pool
    _, space = trace(backbone)
    (term,) = (t for t in space.terms if t.name == "backbone.maxpool")
    assert term.signature.kind == "call" and term.widths == ("backbone.conv1.out",)


def test_a_block_names_its_last_operator_and_what_stays():
    _, space = trace(resnet())
    assert all(b.last == "bn2" for b in space.blocks)
    backbone = resnet()
    builder = SpaceBuilder(Model(backbone), SpaceOptions())
    with pytest.raises(MdpError, match=r"no affine operator at last='conv9'"):
        builder.add_block("backbone.layer1.0", BlockKind.IDENTITY, last="conv9")
    with pytest.raises(MdpError, match=r"no child 'shortcut'"):
        builder.add_block("backbone.layer2.0", BlockKind.RESIDUAL_BRANCH, last="bn2", stays=("shortcut", "relu"))


def test_blocks_survive_their_file_and_masking_is_no_part_of_the_hash(tmp_path):
    _, space = trace(resnet())
    space.save(tmp_path / "space.json")
    assert PruningSpace.load(tmp_path / "space.json") == space
    text = (tmp_path / "space.json").read_text()
    assert '"last"' in text and '"stays"' not in text
    data = json.loads(text)
    for block in data["blocks"]:
        del block["last"]
    (tmp_path / "version1.json").write_text(json.dumps(data))
    old = PruningSpace.load(tmp_path / "version1.json")
    assert old.hash == space.hash and {b.last for b in old.blocks} == {""}
