"""Self-attention with one packed projection for queries, keys and values, as vision transformers have it."""

from __future__ import annotations

from torch import Tensor, nn

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.layers.attention import SeparateAttention, TorchAttention, separate_projections

QKV, PROJECTION, LAYER_SCALE = "qkv", "proj", "gamma1"


class PackedSelfAttention(nn.Module):
    """Self-attention whose number of heads, q/k width and v width are independent.

    Parameters have the names and the order of MMPretrain's ``MultiheadAttention`` and of timm's ``Attention``: ``qkv``
    holds the rows of q, then k, then v, each head after head; ``proj`` maps the heads' values back.

    Args:
        qkv: Linear layer (C to num_heads * (2 * qk_head_dim + v_head_dim)); shared, not copied.
        proj: Linear layer (num_heads * v_head_dim to C); shared.
        num_heads: Heads H.
        qk_head_dim: Width of a query and a key.
        v_head_dim: Width of a value.
        scale: Factor of the logits; a pruned head keeps that of the dense one.
        gamma1: Layer scale behind ``proj``; shared.
    """

    def __init__(
        self,
        qkv: nn.Linear,
        proj: nn.Linear,
        num_heads: int,
        qk_head_dim: int,
        v_head_dim: int,
        scale: float,
        gamma1: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.qkv, self.proj, self.gamma1 = qkv, proj, gamma1 or nn.Identity()
        self.num_heads, self.qk_head_dim, self.v_head_dim, self.scale = num_heads, qk_head_dim, v_head_dim, scale

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        qk, v = self.num_heads * self.qk_head_dim, self.num_heads * self.v_head_dim
        parts = self.qkv(x).split((qk, qk, v), dim=-1)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return self.gamma1(self.proj(mixed.transpose(1, 2).flatten(2)))


def widened(attention: nn.Module) -> PackedSelfAttention | SeparateAttention | TorchAttention:
    """The same attention with independent widths, on the same parameters, in evaluation mode's behaviour.

    Args:
        attention: A `torch.nn.MultiheadAttention` without `torch_obstacle`; or has linear children ``qkv`` and ``proj``
            and the attribute ``num_heads``; or has `separate_projections`. Whether it computes nothing else (relative
            positions, norms of q and k) is for the caller to compare.

    Raises:
        MdpError: It is none of these.
    """
    if isinstance(attention, nn.MultiheadAttention):
        return TorchAttention(attention).train(attention.training)
    if not hasattr(attention, QKV):
        projections = separate_projections(attention)
        if projections is None:
            raise MdpError(f"a {type(attention).__name__} is no attention whose widths can be changed")
        return SeparateAttention(attention, projections).train(attention.training)
    heads = int(attention.num_heads)
    width = attention.qkv.out_features // (3 * heads)
    gamma1 = getattr(attention, LAYER_SCALE, None)
    layer = PackedSelfAttention(attention.qkv, attention.proj, heads, width, width, width**-0.5, gamma1)
    return layer.train(attention.training)
