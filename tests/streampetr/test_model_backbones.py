"""VoVNet and the neck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
