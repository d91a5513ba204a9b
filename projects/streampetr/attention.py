"""Multi-head attention whose head count and head widths are constructor arguments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiheadAttention(nn.Module):
    """Scaled dot-product attention with the parameter names of ``nn.MultiheadAttention``.

    ``in_proj_weight`` is ``[2 * num_heads * qk_head_dim + num_heads * v_head_dim, embed_dims]``: the rows of
    q, then k, then v, each head-major; ``out_proj.weight`` is ``[embed_dims, num_heads * v_head_dim]``.
    ``num_heads``, ``qk_head_dim`` and ``v_head_dim`` are read at run time, so they can change together with
    the weights; ``scale`` stays what it was, as a head keeps its logits when some of its q/k width is cut.

    Args:
        embed_dims: Width of queries, keys, values and output.
        num_heads: Number of heads.
        qk_head_dim: Query/key width of a head; ``embed_dims // num_heads`` by default.
        v_head_dim: Value width of a head; ``embed_dims // num_heads`` by default.
        attn_drop: Dropout probability of the attention weights.
        scale: Factor of the logits; ``qk_head_dim ** -0.5`` by default.

    Raises:
        ValueError: A width is left out and ``embed_dims`` is not divisible by ``num_heads``.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        qk_head_dim: int | None = None,
        v_head_dim: int | None = None,
        attn_drop: float = 0.0,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if (qk_head_dim is None or v_head_dim is None) and embed_dims % num_heads:
            raise ValueError(
                f"embed_dims={embed_dims} is not divisible by num_heads={num_heads}: give both head widths"
            )
        self.num_heads = num_heads
        self.qk_head_dim = qk_head_dim or embed_dims // num_heads
        self.v_head_dim = v_head_dim or embed_dims // num_heads
        self.scale = self.qk_head_dim**-0.5 if scale is None else scale
        self.attn_drop = attn_drop
        rows = num_heads * (2 * self.qk_head_dim + self.v_head_dim)
        self.in_proj_weight = nn.Parameter(torch.empty(rows, embed_dims))
        self.in_proj_bias = nn.Parameter(torch.zeros(rows))
        self.out_proj = nn.Linear(num_heads * self.v_head_dim, embed_dims)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def _project(self, x: Tensor, first_row: int, head_dim: int) -> Tensor:
        last_row = first_row + self.num_heads * head_dim
        x = F.linear(x, self.in_proj_weight[first_row:last_row], self.in_proj_bias[first_row:last_row])
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, head_dim).transpose(1, 2)

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        """Scaled products of projected queries and keys.

        Args:
            query: (B, n, embed_dims).
            key: (B, m, embed_dims).

        Returns:
            Tensor of shape (B, num_heads, n, m).
        """
        q = self._project(query, 0, self.qk_head_dim) * self.scale
        k = self._project(key, self.num_heads * self.qk_head_dim, self.qk_head_dim)
        return q @ k.transpose(-1, -2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attend from ``query`` to ``key``/``value``.

        Args:
            query: (B, n, embed_dims).
            key: (B, m, embed_dims).
            value: (B, m, embed_dims).
            attn_mask: (n or 1, m), boolean: True where attention is blocked, or a summand of the logits.

        Returns:
            Tensor of shape (B, n, embed_dims).
        """
        logits = self.logits(query, key)
        v = self._project(value, 2 * self.num_heads * self.qk_head_dim, self.v_head_dim)
        if attn_mask is not None:
            blocked = attn_mask.dtype == torch.bool
            logits = logits.masked_fill(attn_mask, float("-inf")) if blocked else logits + attn_mask
        weights = logits.softmax(dim=-1)
        if self.attn_drop > 0:
            weights = F.dropout(weights, self.attn_drop, self.training)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


class ResidualAttention(nn.Module):
    """``x + dropout(attn(x + query_pos, key, value))``.

    Args:
        attn: The attention.
        dropout: Dropout probability of its output.
    """

    def __init__(self, attn: MultiheadAttention, dropout: float = 0.0) -> None:
        super().__init__()
        self.attn = attn
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, query_pos: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Shapes as in :class:`MultiheadAttention`; ``query_pos`` is like ``x``."""
        return x + self.dropout(self.attn(x + query_pos, key, value, attn_mask))
