"""Self-attention with one packed projection for queries, keys and values, as vision transformers have it."""

from __future__ import annotations

from torch import Tensor, nn

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.layers.attention import SeparateAttention, TorchAttention, separate_projections

QKV, PROJECTION, LAYER_SCALE = "qkv", "proj", "gamma1"
POSITIONS, INDEX = "relative_position_bias_table", "relative_position_index"


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


class WindowAttention(PackedSelfAttention):
    """`PackedSelfAttention` within windows, with a bias per head and relative position, as Swin has it.

    Parameters have the names of mmdet's, MMPretrain's and timm's: besides ``qkv`` and ``proj``
    ``relative_position_bias_table`` (positions, H) and the buffer ``relative_position_index`` (N, N).

    Args:
        original: Whose children, table and index it takes over.
        width: Width of a head's queries, keys and values.
        scale: Factor of the logits.
    """

    def __init__(self, original: nn.Module, width: int, scale: float) -> None:
        super().__init__(original.qkv, original.proj, int(original.num_heads), width, width, scale)
        self.relative_position_bias_table = original.relative_position_bias_table
        persistent = INDEX in original.state_dict()
        self.register_buffer(INDEX, original.get_buffer(INDEX), persistent=persistent)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(windows, N, C) to the same shape; ``mask`` (windows of an image, N, N) is added to the logits."""
        tokens = x.shape[1]
        qk, v = self.num_heads * self.qk_head_dim, self.num_heads * self.v_head_dim
        parts = self.qkv(x).split((qk, qk, v), dim=-1)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        index = self.get_buffer(INDEX).flatten()
        bias = self.relative_position_bias_table[index].view(tokens, tokens, -1).permute(2, 0, 1)[None]
        if mask is not None:
            bias = bias + mask.repeat(x.shape[0] // mask.shape[0], 1, 1)[:, None]
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def has_positions(attention: nn.Module) -> bool:
    """Whether an attention adds a bias per head and relative position, and holds it as `WindowAttention` does."""
    table, index = getattr(attention, POSITIONS, None), getattr(attention, INDEX, None)
    return isinstance(table, nn.Parameter) and isinstance(index, Tensor) and table.ndim == 2


def widened(attention: nn.Module) -> PackedSelfAttention | SeparateAttention | TorchAttention:
    """The same attention with independent widths, on the same parameters, in evaluation mode's behaviour.

    Args:
        attention: A `torch.nn.MultiheadAttention` without `torch_obstacle`; or has linear children ``qkv`` and ``proj``
            and the attribute ``num_heads``, perhaps with `has_positions`; or has `separate_projections`. Whether it
            computes nothing else (norms of q and k) is for the caller to compare.

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
    if has_positions(attention):
        scale = float(getattr(attention, "scale", width**-0.5))
        return WindowAttention(attention, width, scale).train(attention.training)
    gamma1 = getattr(attention, LAYER_SCALE, None)
    layer = PackedSelfAttention(attention.qkv, attention.proj, heads, width, width, width**-0.5, gamma1)
    return layer.train(attention.training)
