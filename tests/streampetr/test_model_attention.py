"""Attention with free widths, and removal of sub-layers and layers from the decoder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from projects.streampetr.attention import MultiheadAttention
from projects.streampetr.decoder import StreamPETRDecoder

EMBED, HEADS, HEAD_DIM = 64, 4, 16


def dense_attention() -> MultiheadAttention:
    torch.manual_seed(0)
    attention = MultiheadAttention(EMBED, HEADS)
    nn.init.normal_(attention.in_proj_bias, std=0.3)
    nn.init.normal_(attention.out_proj.bias, std=0.3)
    return attention.eval()


def tokens(n: int, seed: int) -> torch.Tensor:
    return torch.randn(2, n, EMBED, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("masked", [False, True])
def test_dense_attention_is_torchs(masked: bool) -> None:
    ours = dense_attention()
    theirs = nn.MultiheadAttention(EMBED, HEADS, batch_first=True).eval()
    theirs.load_state_dict(ours.state_dict())
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) > 0.6 if masked else None
    if mask is not None:
        mask[:, 0] = False
    query, key, value = tokens(5, 2), tokens(7, 3), tokens(7, 4)
    expected = theirs(query, key, value, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(ours(query, key, value, mask), expected)


def sliced(dense: MultiheadAttention, heads: list[int], qk: list[int], v: list[int]) -> MultiheadAttention:
    """An attention constructed with the widths, holding the kept rows and columns of ``dense``."""
    pruned = MultiheadAttention(EMBED, len(heads), qk_head_dim=len(qk), v_head_dim=len(v), scale=dense.scale)
    q_rows = torch.tensor([h * HEAD_DIM + i for h in heads for i in qk])
    v_rows = torch.tensor([h * HEAD_DIM + i for h in heads for i in v])
    rows = torch.cat((q_rows, EMBED + q_rows, 2 * EMBED + v_rows))
    pruned.load_state_dict(
        {
            "in_proj_weight": dense.in_proj_weight[rows],
            "in_proj_bias": dense.in_proj_bias[rows],
            "out_proj.weight": dense.out_proj.weight[:, v_rows],
            "out_proj.bias": dense.out_proj.bias,
        }
    )
    return pruned.eval()


@pytest.mark.parametrize(
    ("heads", "qk", "v"),
    [
        ([0, 1, 2, 3], list(range(16)), list(range(16))),
        ([1, 3], list(range(16)), list(range(16))),
        ([0, 1, 2, 3], [0, 5, 6, 9], list(range(16))),
        ([0, 1, 2, 3], list(range(16)), [2, 3, 11]),
        ([2], [1, 7], [0]),
    ],
)
def test_pruned_attention_is_masked_dense_attention(heads: list[int], qk: list[int], v: list[int]) -> None:
    dense = dense_attention()
    pruned = sliced(dense, heads, qk, v)
    with torch.no_grad():
        kept = torch.zeros(3, HEADS, HEAD_DIM, dtype=torch.bool)
        kept[:2, :, qk] = True
        kept[2, :, v] = True
        dense.in_proj_weight[~kept.flatten()] = 0
        dense.in_proj_bias[~kept.flatten()] = 0
        gone = [h for h in range(HEADS) if h not in heads]
        dense.out_proj.weight.unflatten(1, (HEADS, HEAD_DIM))[:, gone] = 0
    query, key, value = tokens(5, 2), tokens(7, 3), tokens(7, 4)
    torch.testing.assert_close(pruned(query, key, value), dense(query, key, value))


def test_widths_follow_the_attributes_and_scale_stays() -> None:
    dense = dense_attention()
    pruned = sliced(dense, [0, 2], [0, 1, 2, 3], [4, 5])
    in_place = dense_attention()
    for name, value in pruned.state_dict().items():
        owner = in_place.out_proj if name.startswith("out_proj.") else in_place
        setattr(owner, name.rsplit(".", 1)[-1], nn.Parameter(value.clone()))
    in_place.num_heads, in_place.qk_head_dim, in_place.v_head_dim = 2, 4, 2
    assert in_place.scale == HEAD_DIM**-0.5
    query, key = tokens(5, 2), tokens(7, 3)
    torch.testing.assert_close(in_place(query, key, key), pruned(query, key, key))


def test_indivisible_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="embed_dims=64 is not divisible by num_heads=5"):
        MultiheadAttention(64, 5)
    assert MultiheadAttention(64, 5, qk_head_dim=8, v_head_dim=4).out_proj.in_features == 20


def decoder_and_inputs() -> tuple[StreamPETRDecoder, tuple[torch.Tensor, ...]]:
    torch.manual_seed(3)
    decoder = StreamPETRDecoder(
        num_layers=3, embed_dims=EMBED, num_heads=HEADS, ffn_hidden_dims=32, dropout=0.1, self_attn_drop=0.1
    ).eval()
    sizes = (6, 6, 4, 4, 9, 9)  # queries, their positions, memory, its positions, tokens, keys
    return decoder, tuple(tokens(n, i) for i, n in enumerate(sizes))


@pytest.mark.parametrize("sub_layer", ["attentions.0", "attentions.1", "ffns.0"])
def test_removed_sub_layer_loses_its_residual_branch_only(sub_layer: str) -> None:
    decoder, inputs = decoder_and_inputs()
    before = decoder(*inputs)
    layer = decoder.layers[1]
    group, index = sub_layer.split(".")
    module = getattr(layer, group)[int(index)]
    last = module.attn.out_proj if group == "attentions" else module.layers[1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
    silenced = decoder(*inputs)
    getattr(layer, group)[int(index)] = nn.Identity()
    removed = decoder(*inputs)
    torch.testing.assert_close(removed, silenced)
    torch.testing.assert_close(removed[0], before[0])
    assert not torch.allclose(removed[1], before[1], atol=1e-3)


@pytest.mark.parametrize("gone", [[0], [1], [2], [0, 2]])
def test_removed_layer_yields_no_level(gone: list[int]) -> None:
    decoder, inputs = decoder_and_inputs()
    short, _ = decoder_and_inputs()
    short.layers = nn.ModuleList(layer for i, layer in enumerate(short.layers) if i not in gone)
    for i in gone:
        decoder.layers[i] = nn.Identity()
    levels = decoder(*inputs)
    assert len(levels) == 3 - len(gone)
    torch.testing.assert_close(levels, short(*inputs))


def test_decoder_without_layers_is_refused() -> None:
    decoder, inputs = decoder_and_inputs()
    decoder.layers = nn.ModuleList(nn.Identity() for _ in range(3))
    with pytest.raises(ValueError, match=r"every layer of StreamPETRDecoder\.layers has been removed"):
        decoder(*inputs)


def test_checkpointing_does_not_change_gradients() -> None:
    gradients = []
    for with_cp in (False, True):
        decoder, inputs = decoder_and_inputs()
        decoder.with_cp = with_cp
        decoder.train()
        for module in decoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, MultiheadAttention):
                module.attn_drop = 0.0
        decoder(*inputs)[-1].square().sum().backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])
