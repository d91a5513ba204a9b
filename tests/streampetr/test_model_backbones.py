"""VoVNet and the neck."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmdet3d.registry import MODELS
from torch import nn

from mdp_mmdet3d.adapters import InputShape, trace_space
from mdp_mmdet3d.space.types import WidthSum
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan
from projects.streampetr.cp_fpn import CPFPN
from projects.streampetr.vovnet import VoVNet


@pytest.fixture(scope="module")
def vovnet() -> VoVNet:
    return VoVNet("V-99-eSE", out_features=("stage2", "stage3", "stage4", "stage5")).eval()


@torch.no_grad()
def test_vovnet_strides_and_widths(vovnet) -> None:
    shapes = [tuple(x.shape[1:]) for x in vovnet(torch.zeros(1, 3, 96, 160))]
    assert shapes == [(256, 24, 40), (512, 12, 20), (768, 6, 10), (1024, 3, 5)]


def test_vovnet_blocks(vovnet) -> None:
    blocks = {name: [n for n in dict(vovnet.get_submodule(name).named_children()) if n != "Pooling"]
              for name in ("stage2", "stage3", "stage4", "stage5")}  # fmt: skip
    assert [len(names) for names in blocks.values()] == [1, 3, 9, 3]
    identity = [vovnet.get_submodule(f"stage4.{name}").identity for name in blocks["stage4"]]
    assert identity == [False] + [True] * 8
    state = vovnet.state_dict()
    assert state["stem.stem_1/conv.weight"].shape == (64, 3, 3, 3)
    assert state["stage3.OSA3_2.layers.4.OSA3_2_4/conv.weight"].shape == (160, 160, 3, 3)
    assert state["stage3.OSA3_2.concat.OSA3_2_concat/conv.weight"].shape == (512, 512 + 5 * 160, 1, 1)
    assert state["stage5.OSA5_3.ese.fc.bias"].shape == (1024,)


def test_vovnet_norms_are_frozen(vovnet) -> None:
    assert vovnet.train() is vovnet
    norms = [module for module in vovnet.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(norm.training or norm.weight.requires_grad for norm in norms)
    vovnet.eval()


@pytest.mark.parametrize("arguments", [{"spec_name": "V-98"}, {"out_features": ["stage6"]}], ids=str)
def test_unknown_vovnet_is_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"unknown VoVNet .* known: "):
        VoVNet(**arguments)


@torch.no_grad()
def test_neck_adds_the_coarser_lateral() -> None:
    torch.manual_seed(0)
    neck = CPFPN([8, 16], 4)
    fine, coarse = torch.randn(2, 8, 5, 7), torch.randn(2, 16, 3, 4)
    lateral = neck.lateral_convs[1].conv(coarse)
    summed = neck.lateral_convs[0].conv(fine) + F.interpolate(lateral, size=(5, 7), mode="nearest")
    outputs = neck([fine, coarse])
    torch.testing.assert_close(outputs[0], neck.fpn_convs[0].conv(summed))
    torch.testing.assert_close(outputs[1], lateral)
    with pytest.raises(ValueError, match="CPFPN takes 2 inputs but got 1"):
        neck([fine])


def test_every_part_of_an_aggregation_is_prunable(monkeypatch, tiny_config, random_kept):
    """Concatenations of a V2-99 in small: pruned equals masked, and a convolution behind one is priced by its sum."""
    import projects.streampetr.vovnet as vovnet

    small = vovnet.VoVNetSpec((16, 16, 32), (32, 32, 32, 48), (32, 64, 64, 96), (1, 2, 2, 1), 3)
    monkeypatch.setitem(vovnet.SPECS, "V-99-eSE", small)
    config = tiny_config()
    config.img_backbone = dict(type="VoVNet", out_features=("stage4", "stage5"))
    config.img_neck.in_channels = [64, 96]
    torch.manual_seed(0)
    model = MODELS.build(config).eval()
    space = trace_space(model, InputShape(6, 64, 176))
    weights = {n: t.numel() for n, t in model.img_backbone.named_parameters(prefix="img_backbone")}
    members = {m.tensor for d in space.dimensions for m in d.members}
    assert sum(n for name, n in weights.items() if name in members) > 0.95 * sum(weights.values())
    blocks = [b.name for b in space.blocks if b.name.startswith("img_backbone")]
    assert blocks == ["img_backbone.stage3.OSA3_2", "img_backbone.stage4.OSA4_2"]
    term = next(t for t in space.terms if t.name.endswith("OSA3_2_concat/conv"))
    assert isinstance(term.widths[0], WidthSum) and len(term.widths[0].parts) == 4 and term.widths[0].fixed == 0
    assert term.counts({d.name: d.size for d in space.dimensions}) == (64 + 3 * 32, 64)
    for seed in range(2):
        kept, removed = random_kept(space, np.random.default_rng(seed), 0.3)
        plan = PruningPlan.from_kept(space, kept, removed)
        pruned, masked = apply_plan(copy.deepcopy(model), plan), mask_model(copy.deepcopy(model), plan)
        x = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            found, expected = pruned.img_backbone(x), masked.img_backbone(x)
        for ours, theirs in zip(found, expected, strict=True):
            there = theirs.abs().amax((0, 2, 3)) > 0
            assert ours.shape[1] >= int(there.sum())
            torch.testing.assert_close(ours.sum(1), theirs.sum(1), rtol=0, atol=1e-4 * float(theirs.abs().max()))
