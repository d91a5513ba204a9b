"""Random transformer stacks for ``benchmarks/fuzz.py``.

Layers are self-attention, attention to a second set of tokens and feed-forward networks, with the norm before or
behind the residual addition; attention as in PyTorch and mmcv (packed ``in_proj_weight``), as one ``qkv`` layer (ViT,
timm), that within windows with relative positions (Swin), and with separate projections; feed-forward networks as a
plain sequence and as mmcv's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmcv.cnn.bricks.transformer import FFN, MultiheadAttention
from torch import Tensor, nn

KINDS = ("self", "cross", "ffn", "ffn")
FORMS = ("torch", "mmcv", "packed", "windows", "separate")
WIDTH, POOLED, PATCH, WINDOW = 32, 4, 2, 4
Spec = list[tuple[str, int, str]]  # kind and form, heads or hidden width, where the norm is


class Packed(nn.Module):
    """Self-attention with one layer for queries, keys and values."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to the same shape."""
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, -1))


class Windows(Packed):
    """`Packed` on `WINDOW` tokens at a time, with a bias per head and relative position."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.relative_position_bias_table = nn.Parameter(torch.randn(2 * WINDOW - 1, heads))
        places = torch.arange(WINDOW)
        self.register_buffer("relative_position_index", places[:, None] - places + WINDOW - 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B * windows, WINDOW, C) to the same shape."""
        count, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(count, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.reshape(tokens, tokens, -1).permute(2, 0, 1)
        weights = (q @ k.transpose(-1, -2) * (width // self.num_heads) ** -0.5 + bias).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(count, tokens, width))


class Separate(nn.Module):
    """Attention with a layer each for queries, keys and values."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """(B, T, C) and (B, S, C) to (B, T, C)."""

        def split(tokens: Tensor) -> Tensor:
            return tokens.reshape(*tokens.shape[:2], self.num_heads, -1).transpose(1, 2)

        q, k, v = split(self.q_proj(x)), split(self.k_proj(memory)), split(self.v_proj(memory))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).reshape(*x.shape[:2], -1))


class StackLayer(nn.Module):
    """One entry of a `Spec`: an operator with its norm and residual addition."""

    def __init__(self, kind: str, size: int, place: str) -> None:
        super().__init__()
        self.kind, self.form = kind.split("/")
        self.place, self.norm = place, nn.LayerNorm(WIDTH)
        if self.kind == "ffn":
            plain = nn.Sequential(nn.Linear(WIDTH, size), nn.GELU(), nn.Linear(size, WIDTH))
            self.ffn = FFN(WIDTH, size, add_identity=False) if self.form == "mmcv" else plain
        elif self.form == "torch":
            self.attn = nn.MultiheadAttention(WIDTH, size, batch_first=True)
        elif self.form == "mmcv":
            self.attn = MultiheadAttention(WIDTH, size, batch_first=True)
        else:
            self.attn = {"packed": Packed, "windows": Windows, "separate": Separate}[self.form](size)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """(B, T, C), with (B, S, C) to look at, to (B, T, C)."""
        y = self.norm(x) if self.place == "pre" else x
        other = y if self.kind == "self" else memory
        if self.kind == "ffn":
            y = x + self.ffn(y)
        elif self.form == "torch":
            y = x + self.attn(y, other, other, need_weights=False)[0]
        elif self.form == "mmcv":
            y = self.attn(y, other, other, identity=x)
        elif self.form == "windows":
            y = x + self.attn(y.reshape(-1, WINDOW, y.shape[-1])).reshape(x.shape)
        else:
            y = x + (self.attn(y) if self.form == "packed" else self.attn(y, other))
        return y if self.place == "pre" else self.norm(y)


class Stack(nn.Module):
    """Patches of an image through the layers of a `Spec`, and a head for each of them."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.patches, self.others = (nn.Conv2d(3, WIDTH, PATCH, PATCH) for _ in range(2))
        self.layers = nn.ModuleList(StackLayer(*entry) for entry in spec)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> tuple[Tensor, ...]:
        """(B, T, 5)."""
        # Of pixels, the two projections would hold 44 % of the weights of so small a stack (DeiT-base: 0.7 %).
        image = nn.functional.avg_pool2d(inputs, POOLED)
        x, memory = (conv(image).flatten(2).transpose(1, 2) for conv in (self.patches, self.others))
        for layer in self.layers:
            x = layer(x, memory) if isinstance(layer, StackLayer) else layer(x)
        return (self.head(self.norm(x)),)


def random_spec(seed: int) -> Spec:
    """Two to six layers."""
    rng = np.random.default_rng(seed)
    spec: Spec = []
    for _ in range(rng.integers(2, 7)):
        kind, form = str(rng.choice(KINDS)), str(rng.choice(FORMS))
        if kind == "cross" and form in ("packed", "windows"):
            form = "separate"
        size = int(rng.choice([32, 64, 96] if kind == "ffn" else [2, 4]))
        spec.append((f"{kind}/{form}", size, str(rng.choice(["pre", "post"]))))
    return spec


def build(spec: Spec, seed: int) -> nn.Module:
    """The network with random weights, none of them 0 or 1."""
    torch.manual_seed(seed)
    model = Stack(spec)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, 0, 0.1)
        elif parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()
