"""Multi-head attention: heads, and the q/k and v width of a head."""

from __future__ import annotations

from torch import nn

from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.types import DimensionKind, TensorAxis


def add_attention(builder: SpaceBuilder, attn: nn.Module, path: str) -> tuple[str | int, str | int, str | int]:
    """Add the three dimensions of one attention.

    Args:
        builder: Receives them; the sub-layer's block must exist already.
        attn: Has ``num_heads``, ``qk_head_dim``, ``v_head_dim``, packed ``in_proj_weight`` (rows of q, k, v, each
            head-major), ``in_proj_bias`` and ``out_proj``.
        path: Its path in the model.

    Returns:
        Dimension (or dense count, where frozen) of heads, q/k width and v width.
    """
    heads, qk, v = int(attn.num_heads), int(attn.qk_head_dim), int(attn.v_head_dim)
    k_rows, v_rows = heads * qk, 2 * heads * qk

    def in_rows(offset: int, width: int = 1) -> list[TensorAxis]:
        return [TensorAxis(f"{path}.in_proj_{leaf}", 0, offset, width) for leaf in ("weight", "bias")]

    def out_columns(width: int = 1) -> TensorAxis:
        return TensorAxis(f"{path}.out_proj.weight", 1, 0, width)

    multiple = builder.options.head_width_multiple
    head_count = builder.add_dimension(
        f"{path}.heads",
        DimensionKind.HEADS,
        heads,
        [*in_rows(0, qk), *in_rows(k_rows, qk), *in_rows(v_rows, v), out_columns(v)],
        [],
        multiple=1,
    )
    within = head_count if isinstance(head_count, str) else None
    # A gate on a pair of q and k rows (or a v row and its output column) is seen from both sides: half of each.
    qk_width = builder.add_dimension(
        f"{path}.qk",
        DimensionKind.QK_WIDTH,
        qk,
        [*in_rows(0), *in_rows(k_rows)],
        [[*in_rows(0), *in_rows(k_rows)]],
        multiple=multiple,
        copies=heads,
        within=within,
        scale=0.5,
    )
    v_width = builder.add_dimension(
        f"{path}.v",
        DimensionKind.V_WIDTH,
        v,
        [*in_rows(v_rows), out_columns()],
        [[*in_rows(v_rows), out_columns()]],
        multiple=multiple,
        copies=heads,
        within=within,
        scale=0.5,
    )
    return head_count, qk_width, v_width
