"""Post-norm decoder: hybrid self-attention over queries and memory, cross-attention to image tokens, FFN."""

from __future__ import annotations

import torch
from mmdet3d.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import MultiheadAttention, ResidualAttention


class FFN(nn.Module):
    """``x + dropout(Linear(dropout(ReLU(Linear(x)))))``.

    Args:
        embed_dims: Input and output width.
        hidden_dims: Hidden width.
        dropout: Dropout probability after the ReLU and after the second linear.
    """

    def __init__(self, embed_dims: int, hidden_dims: int, dropout: float = 0.0) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(embed_dims, hidden_dims), nn.ReLU(), nn.Dropout(dropout))
        self.layers = nn.Sequential(first, nn.Linear(hidden_dims, embed_dims), nn.Dropout(dropout))
        for linear in (first[0], self.layers[1]):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, embed_dims) to the same shape."""
        return x + self.layers(x)


class StreamPETRDecoderLayer(nn.Module):
    """Self-attention, norm, cross-attention, norm, FFN, norm.

    A sub-layer (``attentions[0]``, ``attentions[1]``, ``ffns[0]``) that is an ``nn.Identity`` has been
    removed: its residual branch is skipped, its norm stays.

    Args:
        embed_dims: Width of the queries and image tokens.
        num_heads: Heads of both attentions.
        ffn_hidden_dims: Hidden width of the FFN.
        dropout: Dropout probability of attention outputs and inside the FFN.
        self_attn_drop: Dropout probability of the self-attention weights.
        cross_attn_drop: Dropout probability of the cross-attention weights.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        ffn_hidden_dims: int = 2048,
        dropout: float = 0.1,
        self_attn_drop: float = 0.1,
        cross_attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            ResidualAttention(MultiheadAttention(embed_dims, num_heads, attn_drop=attn_drop), dropout)
            for attn_drop in (self_attn_drop, cross_attn_drop)
        )
        self.ffns = nn.ModuleList([FFN(embed_dims, ffn_hidden_dims, dropout)])
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dims) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        temp_memory: Tensor,
        temp_pos: Tensor,
        tokens: Tensor,
        token_keys: Tensor,
        self_attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Refine the queries once.

        Args:
            x: (B, n, C) queries.
            query_pos: (B, n, C).
            temp_memory: (B, r, C) memory rows that are not queries.
            temp_pos: (B, r, C).
            tokens: (B, M, C) image tokens, the values.
            token_keys: (B, M, C) tokens plus position embedding.
            self_attn_mask: (n or 1, n + r), as in :class:`MultiheadAttention`.

        Returns:
            Tensor of shape (B, n, C).
        """
        self_attn, cross_attn, ffn = self.attentions[0], self.attentions[1], self.ffns[0]
        if not isinstance(self_attn, nn.Identity):
            value = torch.cat((x, temp_memory), dim=1)
            key = value + torch.cat((query_pos, temp_pos), dim=1)
            x = self_attn(x, query_pos, key, value, self_attn_mask)
        x = self.norms[0](x)
        if not isinstance(cross_attn, nn.Identity):
            x = cross_attn(x, query_pos, token_keys, tokens)
        x = self.norms[1](x)
        return self.norms[2](ffn(x))


@MODELS.register_module()
class StreamPETRDecoder(nn.Module):
    """Stack of decoder layers with one norm shared by all level outputs.

    A layer that is an ``nn.Identity`` has been removed and yields no level.

    Args:
        num_layers: Number of layers.
        embed_dims: Width of the queries and image tokens.
        with_cp: Recompute activations in the backward pass to save memory.
        **layer_kwargs: Arguments of :class:`StreamPETRDecoderLayer`.
    """

    def __init__(self, num_layers: int = 6, embed_dims: int = 256, with_cp: bool = False, **layer_kwargs) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            StreamPETRDecoderLayer(embed_dims=embed_dims, **layer_kwargs) for _ in range(num_layers)
        )
        self.post_norm = nn.LayerNorm(embed_dims)
        self.with_cp = with_cp

    def forward(self, x: Tensor, *args: Tensor | None) -> list[Tensor]:
        """Run the layers.

        Args:
            x: (B, n, C) queries.
            *args: The further arguments of :meth:`StreamPETRDecoderLayer.forward`.

        Returns:
            The post-normed output of each layer, each (B, n, C).

        Raises:
            ValueError: Every layer has been removed.
        """
        levels = []
        for layer in self.layers:
            if isinstance(layer, nn.Identity):
                continue
            if self.with_cp and self.training:
                x = checkpoint(layer, x, *args, use_reentrant=False)
            else:
                x = layer(x, *args)
            levels.append(self.post_norm(x))
        if not levels:
            raise ValueError("every layer of StreamPETRDecoder.layers has been removed; keep at least one")
        return levels
