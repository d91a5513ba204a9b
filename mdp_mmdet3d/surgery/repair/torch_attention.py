"""``torch.nn.MultiheadAttention``, run so that its output projection is a call like any other.

The module hands the weights of ``out_proj`` to one function and never calls it: nothing tells what it takes and gives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_torch_attention(module: nn.Module) -> bool:
    """Whether a module computes what `attend` does."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``module(...)`` in evaluation mode, with ``out_proj`` as a call of its own; arguments as torch's.

    The function of torch gets the unit matrix as output projection, so what it returns are the heads' outputs, side by
    side: what ``out_proj`` takes.
    """
    swap = module.batch_first and query.dim() == 3
    if swap:
        query, key, value = (each.transpose(0, 1) for each in (query, key, value))
    width = module.out_proj.in_features
    kwargs: dict[str, Any] = {}
    if module.in_proj_weight is None:
        kwargs = dict(
            use_separate_proj_weight=True,
            q_proj_weight=module.q_proj_weight,
            k_proj_weight=module.k_proj_weight,
            v_proj_weight=module.v_proj_weight,
        )
    heads, weights = F.multi_head_attention_forward(
        query,
        key,
        value,
        module.embed_dim,
        module.num_heads,
        module.in_proj_weight,
        module.in_proj_bias,
        module.bias_k,
        module.bias_v,
        module.add_zero_attn,
        0.0,
        torch.eye(width, dtype=query.dtype, device=query.device),
        None,
        training=False,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
        **kwargs,
    )
    # In the layout of the module's output, which is that of the sum that it enters.
    return module.out_proj(heads.transpose(0, 1) if swap else heads), weights
