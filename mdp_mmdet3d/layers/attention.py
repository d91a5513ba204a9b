"""Attentions with independent numbers of heads, q/k and v widths, under the names of those that they replace."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

HEADS = ("num_heads", "n_heads", "n_head", "nhead", "heads", "num_attention_heads")
FILL = ("proj", "projection", "linear", "to", "fc", "layer")
PARTS = {"q": 0, "query": 0, "queries": 0, "k": 1, "key": 1, "keys": 1, "v": 2, "value": 2, "values": 2}


@dataclass(frozen=True)
class Projections:
    """Where an attention with separate projections holds them.

    Attributes:
        inputs: Paths of the linear layers of queries, keys and values.
        out: Path of the linear layer behind the heads.
        heads: Number of heads.
        qk: Width of a query and a key of a head.
        v: Width of a value of a head.
    """

    inputs: tuple[str, str, str]
    out: str
    heads: int
    qk: int
    v: int


def separate_projections(module: nn.Module) -> Projections | None:
    """The projections of a module that has four linear layers, three of them called after q, k and v, and heads."""
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    heads = next((h for h in (getattr(module, name, None) for name in HEADS) if isinstance(h, int)), 0)
    inputs: dict[int, str] = {}
    for name in linears:
        words = [
            w for w in re.split(r"[_.0-9]+", name.lower()) if w not in ("proj", "projection", "linear", "to", "fc")
        ]
        word = words[0].removeprefix("w") or "w" if len(words) == 1 else ""
        if word in PARTS:
            inputs.setdefault(PARTS[word], name)
    rest = [name for name in linears if name not in inputs.values()]
    if len(linears) != 4 or len(inputs) != 3 or len(rest) != 1 or heads < 1:
        return None
    query, key, value = (linears[inputs[part]] for part in range(3))
    fits = query.out_features == key.out_features and linears[rest[0]].in_features == value.out_features
    if not fits or query.out_features % heads or value.out_features % heads:
        return None
    names = (inputs[0], inputs[1], inputs[2])
    return Projections(names, rest[0], heads, query.out_features // heads, value.out_features // heads)


def has_independent_widths(module: nn.Module) -> bool:
    """Whether it has the parameters and widths of a `TorchAttention`, takes (B, T, C), and can be cut as it is."""
    widths = (getattr(module, name, None) for name in ("num_heads", "qk_head_dim", "v_head_dim"))
    packed, out = getattr(module, "in_proj_weight", None), getattr(module, "out_proj", None)
    parts = isinstance(packed, nn.Parameter) and isinstance(out, nn.Linear) and not isinstance(module, TorchAttention)
    return parts and all(isinstance(width, int) for width in widths)


def is_deformable(module: nn.Module) -> bool:
    """Whether it is a multi-scale deformable attention with the parts of mmcv's; fewer heads need no other class."""
    parts = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    return isinstance(getattr(module, "num_heads", None), int) and all(
        isinstance(getattr(module, part, None), nn.Linear) for part in parts
    )


class SeparateAttention(nn.Module):
    """Attention with a linear layer each for queries, keys and values.

    It is called with the stream alone (self-attention), with the stream and what it looks at, or with queries, keys
    and values, by position or by the names of the original's arguments. Masks are not supported.

    Args:
        original: The attention whose children it takes over, shared and under their names.
        projections: `separate_projections` of it.
    """

    def __init__(self, original: nn.Module, projections: Projections) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self._projections = projections  # its children may have any name, `out` among them
        self.num_heads, self.qk_head_dim, self.v_head_dim = projections.heads, projections.qk, projections.v
        self.scale = projections.qk**-0.5  # a pruned head keeps that of the dense one
        self._arguments = tuple(inspect.signature(original.forward).parameters)

    def forward(self, *inputs: Tensor, **named: Tensor | None) -> Tensor:
        """(B, T, C), or with (B, S, C) to look at, to (B, T, C).

        Raises:
            TypeError: There are more inputs than queries, keys and values.
        """
        given = [*inputs, *(named[name] for name in self._arguments[len(inputs) :] if name in named)]
        found = [value for value in given if value is not None]
        if not 1 <= len(found) <= 3 or any(not isinstance(value, Tensor) or value.ndim != 3 for value in found):
            raise TypeError(f"an attention takes queries, keys and values of shape (B, T, C), not {len(found)} inputs")
        query, key, value = (found * 3)[:3] if len(found) == 1 else (found[0], found[1], found[-1])
        projected = [self.get_submodule(name)(x) for name, x in zip(self._projections.inputs, (query, key, value))]
        mixed: Tensor = self.get_submodule(self._projections.out)(_attend(projected, self.num_heads, self.scale))
        return mixed


class TorchAttention(nn.Module):
    """`torch.nn.MultiheadAttention` with independent widths; it returns no attention weights.

    Parameters have its names: ``in_proj_weight`` holds the rows of q, then k, then v, each head after head.

    Args:
        original: Has one width for queries, keys and values; its parameters are shared, not copied.
    """

    # What torch.nn.TransformerEncoderLayer reads to see that its fused form does not apply.
    _qkv_same_embed_dim = False

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = original.in_proj_weight, original.in_proj_bias
        self.out_proj, self.batch_first = original.out_proj, original.batch_first
        self.embed_dim, self.num_heads = original.embed_dim, original.num_heads
        self.qk_head_dim = self.v_head_dim = original.head_dim
        self.scale = original.head_dim**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As that of `torch.nn.MultiheadAttention` on batches; masks are True, or negative, where nothing is seen."""
        rows = (self.num_heads * self.qk_head_dim,) * 2 + (self.num_heads * self.v_head_dim,)
        weights = self.in_proj_weight.split(rows)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(rows)
        inputs = [x if self.batch_first else x.transpose(0, 1) for x in (query, key, value)]
        projected = [nn.functional.linear(x, w, b) for x, w, b in zip(inputs, weights, biases)]
        mask = _added(attn_mask, query)
        if mask is not None and mask.ndim == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, query)[:, None, None]  # type: ignore[index]
            mask = padding if mask is None else mask + padding
        out = self.out_proj(_attend(projected, self.num_heads, self.scale, mask))
        return out if self.batch_first else out.transpose(0, 1), None


def torch_obstacle(attention: nn.MultiheadAttention) -> str | None:
    """Why the widths of a `torch.nn.MultiheadAttention` cannot be changed, or None."""
    if not attention._qkv_same_embed_dim:
        return "an attention whose keys or values have another width than its queries"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "an attention that appends a key of its own"
    return None


def _added(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, float("-inf"))


def _attend(projected: list[Tensor], heads: int, scale: float, mask: Tensor | None = None) -> Tensor:
    """(B, T, heads * qk), (B, S, heads * qk), (B, S, heads * v) to (B, T, heads * v)."""
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected)
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return mixed.transpose(1, 2).flatten(2)
