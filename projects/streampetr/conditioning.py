"""Modules that modulate features by a condition: motion-aware norm and position-embedding gate."""

from __future__ import annotations

from torch import Tensor, nn


class MLN(nn.Module):
    """Motion-aware layer norm: ``gamma(h) * LN(x) + beta(h)`` with ``h = ReLU(Linear(condition))``.

    The layer norm has no affine parameters (StreamPETR, arXiv 2303.11926, section 3.3).

    Args:
        cond_dims: Channels of the condition.
        embed_dims: Channels of the features.
        hidden_dims: Width of h; ``embed_dims`` by default.
    """

    def __init__(self, cond_dims: int, embed_dims: int, hidden_dims: int | None = None) -> None:
        super().__init__()
        hidden_dims = hidden_dims or embed_dims
        self.reduce = nn.Sequential(nn.Linear(cond_dims, hidden_dims), nn.ReLU())
        self.norm = nn.LayerNorm(embed_dims, elementwise_affine=False)
        self.gamma = nn.Linear(hidden_dims, embed_dims)
        self.beta = nn.Linear(hidden_dims, embed_dims)
        nn.init.zeros_(self.gamma.weight)
        nn.init.ones_(self.gamma.bias)
        nn.init.zeros_(self.beta.weight)
        nn.init.zeros_(self.beta.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Modulate ``x`` (B, n, embed_dims) by ``condition`` (B, n or 1, cond_dims)."""
        hidden = self.reduce(condition)
        return self.gamma(hidden) * self.norm(x) + self.beta(hidden)


class FeaturizedPositionEmbedding(nn.Module):
    """Gate the position embedding by the token: ``pos * sigmoid(expand(ReLU(reduce(token))))``."""

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Linear(embed_dims, embed_dims)
        self.conv_expand = nn.Linear(embed_dims, embed_dims)

    def forward(self, pos_embed: Tensor, tokens: Tensor) -> Tensor:
        """Both arguments and the result are (B, M, embed_dims)."""
        return pos_embed * self.conv_expand(self.conv_reduce(tokens).relu()).sigmoid()
