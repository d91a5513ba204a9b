"""torch's own attention: the call that tells its projections apart, and their repair."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mdp_mmdet3d.surgery.repair import repair
from mdp_mmdet3d.surgery.repair.torch_attention import attend

from .repair_nets import PRECISE, axes, cut, error, frames_of, plan_of, randomise

MODULES = {
    "sequence first": dict(),
    "batch first": dict(batch_first=True),
    "no bias": dict(bias=False),
    "other keys and values": dict(kdim=6, vdim=10),
    "extra key": dict(add_bias_kv=True, add_zero_attn=True),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("batched", [True, False])
def test_the_call_gives_what_the_module_gives(kind, batched):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, dropout=0.5, **MODULES[kind]).eval()
    if module.in_proj_bias is not None:
        module.in_proj_bias.data.normal_()
        module.out_proj.bias.data.normal_()
    shapes = ((5, 3, 8), (7, 3, module.kdim), (7, 3, module.vdim))
    arguments = [torch.randn(shape) for shape in shapes]
    if module.batch_first:
        arguments = [x.transpose(0, 1) for x in arguments]
    padded = torch.zeros(3, 7, dtype=torch.bool)
    padded[:, -1] = True
    if not batched:
        arguments = [x[0] if module.batch_first else x[:, 0] for x in arguments]
        padded = padded[0]
    masks = dict(key_padding_mask=padded, attn_mask=torch.randn(5, 7) > 1)
    for kwargs in (dict(), masks, dict(need_weights=False), dict(average_attn_weights=False)):
        with torch.no_grad():
            expected, weights = module(*arguments, **kwargs)
            found, found_weights = attend(module, *arguments, **kwargs)
        torch.testing.assert_close(found, expected)
        if weights is None:
            assert found_weights is None
        else:
            torch.testing.assert_close(found_weights, weights)


class Block(nn.Module):
    """Attention behind a hidden layer, on a residual stream; keys of another width where asked for."""

    def __init__(self, kdim: int | None) -> None:
        super().__init__()
        self.keys = nn.Linear(8, kdim or 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, kdim=kdim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x, key=self.keys(x), value=x, need_weights=False)[0]


@pytest.mark.parametrize("kdim", [None, 6])
def test_changed_projections_are_found_again(kdim):
    torch.manual_seed(0)
    model = Block(kdim).eval()
    plan = plan_of(model, {})
    pruned = copy.deepcopy(model)
    attn, dense = pruned.attn, model.attn
    with torch.no_grad():
        for name, parameter in attn.named_parameters():
            parameter += 0.3 * torch.randn_like(parameter) * (not name.startswith("bias"))
    inputs = [torch.randn(4, 10, 8) for _ in range(5)]
    before = error(model, pruned, inputs[-1])
    report = {layer.name: layer for layer in repair(model, pruned, plan, frames_of(inputs[:4]), PRECISE).layers}
    assert before > 0.05 and error(model, pruned, inputs[-1]) < 1e-3
    assert not any(report[f"attn.{name}"].left for name in ("query", "key", "value", "out_proj"))
    for name, parameter in attn.named_parameters():
        torch.testing.assert_close(parameter, dict(dense.named_parameters())[name], atol=1e-2, rtol=0)
    assert "forward" not in vars(attn)


def test_an_encoder_of_torch_is_repaired_behind_a_cut():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    model = randomise(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), encoder, nn.Linear(8, 8)))
    hidden = axes(("0.weight", 0), ("0.bias", 0), ("2.weight", 1))
    plan = plan_of(model, {"hidden": (range(10), 16, hidden)})
    pruned, inputs = cut(model, plan), [torch.randn(8, 12, 8) for _ in range(9)]
    before = error(model, pruned, inputs[-1])
    enabled = torch.backends.mha.get_fastpath_enabled()
    report = {layer.name: layer for layer in repair(model, pruned, plan, frames_of(inputs[:8])).layers}
    assert error(model, pruned, inputs[-1]) < 0.7 * before
    attention = "3.layers.0.self_attn"
    assert all(report[f"{attention}.{name}"].calls == 1 for name in ("query", "key", "value", "out_proj"))
    assert torch.backends.mha.get_fastpath_enabled() == enabled
