"""The traced space is complete, consistent with the model, and survives its file."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine import Config
from torch import nn

from mdp_mmdet3d.adapters import InputShape, trace_space
from mdp_mmdet3d.errors import FileFormatError, MdpError
from mdp_mmdet3d.operators import OperatorSignature
from mdp_mmdet3d.space import BlockKind, DimensionKind, PruningSpace, TensorAxis
from mdp_mmdet3d.space.builder import SpaceBuilder, SpaceOptions
from mdp_mmdet3d.space.conv import add_conv_dimensions
from mdp_mmdet3d.space.types import WidthSum


@pytest.fixture(scope="module")
def full():
    """The R50 704x256 model and its space."""
    from mmdet3d.registry import MODELS
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet3d")
    model = MODELS.build(Config.fromfile("configs/_base_/models/streampetr_r50_704x256_428q.py").model)
    return model, trace_space(model, InputShape(6, 256, 704))


@pytest.mark.slow
def test_everything_that_section_5_2_lists_is_there(full):
    _, space = full
    names = {d.name: d for d in space.dimensions}
    bottlenecks = [f"img_backbone.layer{s}.{b}" for s, n in zip((1, 2, 3, 4), (3, 4, 6, 3)) for b in range(n)]
    for path in bottlenecks:
        assert {f"{path}.conv1.out", f"{path}.conv2.out"} <= names.keys()
    assert names["img_backbone.conv1.out"].size == 64
    kinds = [b.kind for b in space.blocks]
    assert kinds.count(BlockKind.IDENTITY) == 12 and kinds.count(BlockKind.RESIDUAL_BRANCH) == 4
    assert kinds.count(BlockKind.LAYER) == 5 and kinds.count(BlockKind.SUB_LAYER) == 17  # one cross-attention stays
    for kind, count in ((DimensionKind.HEADS, 12), (DimensionKind.QK_WIDTH, 12), (DimensionKind.V_WIDTH, 12)):
        assert sum(d.kind is kind for d in space.dimensions) == count
    assert sum(".ffns." in n for n in names) == 6
    for hidden in (
        "position_encoder.0",
        "memory_embed.0",
        "featurized_pe.conv_reduce",
        "cls_branches.0.0",
        "cls_branches.0.3",
        "reg_branches.0.0",
        "reg_branches.0.2",
        "query_embedding.0",
    ):
        assert f"pts_bbox_head.{hidden}.out" in names


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage,size,consumers",
    [
        (1, 256, ["img_backbone.layer2.0.conv1", "img_backbone.layer2.0.downsample.0"]),
        (2, 512, ["img_backbone.layer3.0.conv1", "img_backbone.layer3.0.downsample.0"]),
        (
            3,
            1024,
            ["img_backbone.layer4.0.conv1", "img_backbone.layer4.0.downsample.0", "img_neck.lateral_convs.0.conv"],
        ),
        (4, 2048, ["img_neck.lateral_convs.1.conv"]),
    ],
)
def test_stage_width_couples_all_its_users(full, stage, size, consumers):
    model, space = full
    dimension = space.by_name[f"img_backbone.layer{stage}.0.downsample.0.out"]
    assert dimension.size == size
    rows = {m.tensor for m in dimension.members if m.axis == 0}
    columns = {m.tensor for m in dimension.members if m.axis == 1}
    blocks = len(getattr(model.img_backbone, f"layer{stage}"))
    for b in range(blocks):
        path = f"img_backbone.layer{stage}.{b}"
        assert {f"{path}.conv3.weight", f"{path}.bn3.weight", f"{path}.bn3.running_var"} <= rows
        if b:
            assert f"{path}.conv1.weight" in columns
    assert {f"{c}.weight" for c in consumers} <= columns
    assert {s.block for s in dimension.sources} == {None, *(f"img_backbone.layer{stage}.{b}" for b in range(blocks))}


def test_no_two_dimensions_of_the_same_kind_share_an_index(tiny_model):
    space = trace_space(tiny_model, InputShape(6, 64, 176))
    taken = {}
    for d in space.dimensions:
        kind = d.kind if d.kind is DimensionKind.HEADS else "other"  # heads and their inner widths overlap by design
        for m in d.members:
            indices = set(range(m.offset, m.offset + d.copies * d.size * m.width))
            owner = taken.setdefault((m.tensor, m.axis, kind), set())
            assert not owner & indices, (d.name, m)
            owner |= indices


def test_terms_name_existing_modules_and_dimensions(tiny_model):
    space = trace_space(tiny_model, InputShape(6, 64, 176))
    assert len({t.name for t in space.terms}) == len(space.terms)
    for term in space.terms:
        assert all(w in space.by_name for w in term.widths if isinstance(w, str))
        tiny_model.get_submodule(term.name.removesuffix(".upsample_add"))
        assert term.block is None or term.block in space.blocks_by_name
    by_name = {t.name: t for t in space.terms}
    stem = by_name["img_backbone.layer2.0.conv1"].signature
    assert (stem["batch"], stem["height"], stem["width"], stem["stride"]) == (6, 16, 44, 2)
    cross = by_name["pts_bbox_head.transformer.decoder.layers.1.attentions.1.attn"].signature
    assert (cross["queries"], cross["keys"]) == (76, 6 * 4 * 11)
    own = by_name["pts_bbox_head.transformer.decoder.layers.1.attentions.0.attn"].signature
    assert own["keys"] == 60 + 64


def test_rows_norms_and_activations_of_the_head_are_those_that_run(tiny_model):
    """Constants are no rows: the learned queries' embeddings, and what a query that stands still is conditioned on."""
    queries, rows, tokens = 60 + 16, 64, 6 * 4 * 11
    space = trace_space(tiny_model, InputShape(6, 64, 176))
    gate, branches = "featurized_pe.conv_", ("cls_branches.0", "reg_branches.0")
    expected = {f"{gate}reduce": (tokens, "none", "relu"), f"{gate}expand": (tokens, "none", "none")}
    for name, count in (("position_encoder", tokens), ("memory_embed", tokens), ("query_embedding", rows)):
        expected |= {f"{name}.0": (count, "none", "relu"), f"{name}.2": (count, "none", "none")}
    for name, count in (("spatial_alignment", tokens), ("ego_pose_pe", rows), ("ego_pose_memory", rows)):
        expected |= {f"{name}.{leaf}": (count, "none", "none") for leaf in ("gamma", "beta")}
        expected[f"{name}.reduce.0"] = (count, "none", "relu")
    for name, norm, step in zip(branches, ("layer", "none"), (3, 2)):
        expected |= {f"{name}.{i * step}": (queries, norm, "relu") for i in range(2)}
        expected[f"{name}.{2 * step}"] = (queries, "none", "none")
    signatures = {
        t.name.removeprefix("pts_bbox_head."): t.signature for t in space.terms if t.signature.kind == "linear"
    }
    assert {n: (s["tokens"], s["norm"], s["activation"]) for n, s in signatures.items()} == expected
    assert {t.engine for t in space.terms if "position_encoder" in t.name} == {"position_embedding"}
    layers = {t.name.partition("layers.")[2]: t.signature for t in space.terms if "decoder" in t.name}
    own = OperatorSignature.make("attention", queries=queries, keys=60 + rows, embed_dims=256, shared=True)
    cross = OperatorSignature.make("attention", queries=queries, keys=tokens, embed_dims=256, shared=False)
    ffn = OperatorSignature.make("ffn", tokens=queries, embed_dims=256)
    parts = {"attentions.0.attn": own, "attentions.1.attn": cross, "ffns.0": ffn}
    assert layers == {f"{i}.{part}": signature for i in range(3) for part, signature in parts.items()}
    assert len(space.terms) == len(signatures) + len(layers) + sum(t.engine == "image_encoder" for t in space.terms)


def test_convolutions_of_the_encoder_are_priced_with_what_they_are_fused_with(tiny_model):
    terms = {t.name: t.signature for t in trace_space(tiny_model, InputShape(6, 64, 176)).terms}
    encoder = {n: s for n, s in terms.items() if n.startswith("img_") and s.kind == "conv"}
    convs = {n for n, m in tiny_model.named_modules() if isinstance(m, nn.Conv2d) and n.startswith("img_")}
    assert encoder.keys() == convs - {"img_backbone.conv1"}  # 3 to 16 channels in every plan
    bare = {n for n in encoder if "downsample" in n or "img_neck" in n}
    assert {n for n, s in encoder.items() if not s["relu"]} == bare
    assert {n for n, s in encoder.items() if s["residual"]} == {n for n in encoder if "layer" in n and "conv2" in n}
    others = {n: s.kind for n, s in terms.items() if n.startswith("img_") and s.kind != "conv"}
    assert others == {"img_neck.lateral_convs.0.conv.upsample_add": "upsample_add"}


@pytest.mark.slow
def test_the_full_model_has_the_terms_of_the_recorded_latency_tables(full):
    """Their entries are found by kind and attributes."""
    kinds = Counter((t.engine, t.signature.kind) for t in full[1].terms)
    assert kinds == {
        ("image_encoder", "conv"): 56, ("image_encoder", "max_pool"): 1, ("image_encoder", "upsample_add"): 1,
        ("position_embedding", "linear"): 2, ("head", "linear"): 21, ("head", "attention"): 12, ("head", "ffn"): 6,
    }  # fmt: skip


def test_tracing_leaves_the_model_as_it_was(tiny_model):
    tiny_model.train()
    before = (
        {k: v.clone() for k, v in tiny_model.state_dict().items()},
        [m.training for m in tiny_model.modules()],
        [p.requires_grad for p in tiny_model.parameters()],
    )
    trace_space(tiny_model, InputShape(6, 64, 176))
    assert all(torch.equal(v, before[0][k]) for k, v in tiny_model.state_dict().items())
    assert [m.training for m in tiny_model.modules()] == before[1]
    assert [p.requires_grad for p in tiny_model.parameters()] == before[2]
    assert all(p.grad is None for p in tiny_model.parameters())


def test_file_round_trip_and_damage(tiny_model, tmp_path):
    space = trace_space(tiny_model, InputShape(6, 64, 176))
    space.save(tmp_path / "space.json")
    assert PruningSpace.load(tmp_path / "space.json") == space
    data = json.loads((tmp_path / "space.json").read_text())
    del data["dimensions"][0]["options"]
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(FileFormatError, match="damaged"):
        PruningSpace.load(tmp_path / "bad.json")
    data["schema_version"] = 99
    (tmp_path / "new.json").write_text(json.dumps(data))
    with pytest.raises(FileFormatError, match="schema_version 99"):
        PruningSpace.load(tmp_path / "new.json")


def test_freezing_and_its_typos(tiny_model):
    frozen = trace_space(tiny_model, InputShape(6, 64, 176), SpaceOptions(freeze=("img_backbone.*", "*.heads")))
    assert not any(d.name.startswith("img_backbone") or d.name.endswith("heads") for d in frozen.dimensions)
    assert not any(b.name.startswith("img_backbone") for b in frozen.blocks)
    reasons = {n.module: n.reason for n in frozen.not_prunable}
    assert reasons["img_backbone.layer2.0"] == "frozen by the config"
    # A width within frozen heads stands for itself.
    assert all(d.within is None for d in frozen.dimensions)
    with pytest.raises(MdpError, match=r"'img_backbon\.\*' matches no dimension"):
        trace_space(tiny_model, InputShape(6, 64, 176), SpaceOptions(freeze=("img_backbon.*",)))


def test_a_model_without_tensor_mode_is_refused_with_what_it_lacks():
    with pytest.raises(
        MdpError, match=r"Linear has no adapter of its own, and Linear\.forward\(mode='tensor'\) does not"
    ):
        trace_space(nn.Linear(2, 2), InputShape(1, 32, 32))


def test_description_names_everything(tiny_model):
    space = trace_space(tiny_model, InputShape(6, 64, 176))
    text = space.describe()
    assert all(d.name in text for d in space.dimensions) and all(b.name in text for b in space.blocks)
    assert all(n.reason in text for n in space.not_prunable)


@given(
    size=st.integers(1, 4096), multiple=st.sampled_from([1, 8, 16, 32]), most=st.integers(2, 32), keep=st.floats(0, 1)
)
def test_options_increase_end_dense_and_respect_the_limits(size, multiple, most, keep):
    counts = SpaceOptions(max_options=most, min_keep=keep).counts(size, multiple)
    assert counts[-1] == size and list(counts) == sorted(set(counts))
    assert len(counts) <= most and all(c % multiple == 0 and c >= round(keep * size) for c in counts[:-1])


def test_each_part_of_a_concatenation_is_a_dimension_and_its_reader_has_their_sum():
    class Concat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 48, 3, padding=1)
            self.c = nn.Conv2d(80, 32, 1)
            self.d = nn.Conv2d(32, 8, 1)

        def forward(self, x):
            a = self.a(x)
            return self.d(self.c(torch.cat([a, self.b(a)], dim=1)))

    net = Concat()
    builder = SpaceBuilder(net, SpaceOptions())
    add_conv_dimensions(builder, net)
    assert {"a.out", "b.out", "c.out"} == set(builder.dimensions) - {"d.out"}
    assert TensorAxis("c.weight", 1, 32) in builder.dimensions["b.out"].members
    width = builder.width_of("c.weight", 1, 80)
    assert isinstance(width, WidthSum) and dict(width.parts) == {"a.out": 1, "b.out": 1} and width.fixed == 0
    sizes = dict(batch=1, height=8, width=8, kernel_h=1, kernel_w=1, stride=1, padding=0, groups=1)
    builder.add_term("c", "e", "conv", (width, "c.out"), relu=False, residual=False, **sizes)
    builder.leave("b.out", "for a reason")
    assert builder.terms["c"].widths == (WidthSum((("a.out", 1),), 48), "c.out")
