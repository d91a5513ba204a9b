"""Guidance of the cross-attention: projected tokens and the loss."""

from __future__ import annotations

import math

import pytest
import torch

from projects.streampetr.attention import MultiheadAttention
from projects.streampetr.decoder import StreamPETRDecoder
from projects.streampetr.guidance import AttentionGuidance, projected_tokens

# Two cameras that look along +x and -x: 70 px focal length, 96x64 images, stride 16.
FORWARD = torch.tensor([[48.0, -70, 0, 0], [32, 0, -70, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
BACKWARD = torch.tensor([[-48.0, 70, 0, 0], [-32, 0, -70, 0], [-1, 0, 0, 0], [0, 0, 0, 1]])
MATRICES = torch.stack((FORWARD, BACKWARD)).unsqueeze(0)


def test_points_mark_the_token_that_shows_them() -> None:
    points = torch.tensor([[[10.0, 0.1, -0.1], [-10.0, 2.0, 1.0], [0.1, 50.0, 0.0]]])
    tokens = projected_tokens(points, MATRICES, 4, 6, 16)
    assert tokens.shape == (1, 3, 2 * 24)
    assert tokens[0, 0].nonzero().flatten().tolist() == [2 * 6 + 2]
    u, v = 48 + 70 * 2 / -10 * -1, 32 - 70 * 1 / 10
    assert tokens[0, 1].nonzero().flatten().tolist() == [24 + int(v // 16) * 6 + int(u // 16)]
    assert not tokens[0, 2].any()


def test_loss_is_minus_the_log_of_the_attention_on_these_tokens() -> None:
    torch.manual_seed(0)
    guidance = AttentionGuidance(weight=2.0)
    attention = MultiheadAttention(8, 2).train()
    attention.register_forward_pre_hook(guidance._record)
    query, key = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    attention(query, key, key)
    tokens = torch.tensor([[[True, False, False, False, True], [False] * 5, [False, False, True, False, False]]])
    weights = attention.logits(query, key).softmax(dim=-1)
    mass = torch.stack((weights[0, :, 0, [0, 4]].sum(-1), weights[0, :, 2, 2]))
    losses = guidance.losses(tokens)
    torch.testing.assert_close(losses["guidance_loss"], -2 * mass.log().mean())
    torch.testing.assert_close(losses["guidance_mass"], mass.mean())
    assert guidance.losses(tokens) == {}


def test_loss_aligns_attention_with_position() -> None:
    torch.manual_seed(0)
    guidance = AttentionGuidance()
    attention = MultiheadAttention(16, 2).train()
    attention.register_forward_pre_hook(guidance._record)
    query, key = torch.randn(1, 6, 16), torch.randn(1, 6, 16)
    tokens = torch.eye(6, dtype=torch.bool).unsqueeze(0)
    optimizer = torch.optim.Adam(attention.parameters(), lr=2e-2)
    masses = []
    for _ in range(100):
        attention(query, key, key)
        losses = guidance.losses(tokens)
        optimizer.zero_grad()
        losses["guidance_loss"].backward()
        optimizer.step()
        masses.append(losses["guidance_mass"].item())
    assert masses[0] < 0.4 < 0.9 < masses[-1]


def test_frames_in_which_no_query_is_seen_cost_nothing() -> None:
    guidance = AttentionGuidance()
    attention = MultiheadAttention(8, 2).train()
    attention.register_forward_pre_hook(guidance._record)
    attention(torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8))
    losses = guidance.losses(torch.zeros(1, 3, 5, dtype=torch.bool))
    assert losses["guidance_loss"].item() == 0.0 and math.isfinite(losses["guidance_mass"].item())
    losses["guidance_loss"].backward()
    assert attention.in_proj_weight.grad.isfinite().all()


def test_nothing_is_recorded_in_evaluation_or_when_inactive() -> None:
    guidance = AttentionGuidance()
    decoder = StreamPETRDecoder(2, 16, num_heads=2, ffn_hidden_dims=16)
    guidance.watch(decoder)
    x, tokens = torch.randn(1, 3, 16), torch.randn(1, 5, 16)
    arguments = (x, x, x[:, :0], x[:, :0], tokens, tokens)
    mask = torch.ones(1, 3, 5, dtype=torch.bool)
    decoder.eval()(*arguments)
    assert guidance.losses(mask) == {}
    decoder.train()(*arguments)
    assert len(guidance._logits) == 2 and guidance.losses(mask)
    guidance.active = False
    decoder(*arguments)
    assert guidance.losses(mask) == {}
    with pytest.raises(ValueError, match="activation checkpointing"):
        guidance.watch(StreamPETRDecoder(1, 16, with_cp=True, num_heads=2, ffn_hidden_dims=16))
