"""Multi-head attention: heads, and the q/k and v width of a head."""

from __future__ import annotations

from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.types import DimensionKind, TensorAxis


def add_attention(
    builder: SpaceBuilder,
    path: str,
    heads: int,
    qk: int,
    v: int,
    *,
    packed: tuple[str, ...] = ("in_proj_weight", "in_proj_bias"),
    separate: tuple[tuple[str, ...], ...] = (),
    out: str = "out_proj.weight",
) -> tuple[str | int, str | int, str | int]:
    """Add the three dimensions of one attention.

    Args:
        builder: Receives them; the sub-layer's block must exist already.
        path: Its path in the model.
        heads: Dense number of heads.
        qk: Dense width of a query and a key.
        v: Dense width of a value.
        packed: Tensors below ``path`` whose rows are those of q, then k, then v, each head after head.
        separate: In place of ``packed``, the tensors of q, those of k and those of v.
        out: Weight below ``path`` of the output projection, whose columns are those of v.

    Returns:
        Dimension (or dense count, where frozen) of heads, q/k width and v width.
    """
    starts = (0, heads * qk, 2 * heads * qk)

    def in_rows(part: int, width: int = 1) -> list[TensorAxis]:
        leaves, start = (separate[part], 0) if separate else (packed, starts[part])
        return [TensorAxis(f"{path}.{leaf}", 0, start, width) for leaf in leaves]

    def out_columns(width: int = 1) -> TensorAxis:
        return TensorAxis(f"{path}.{out}", 1, 0, width)

    multiple = builder.options.head_width_multiple
    head_count = builder.add_dimension(
        f"{path}.heads",
        DimensionKind.HEADS,
        heads,
        [*in_rows(0, qk), *in_rows(1, qk), *in_rows(2, v), out_columns(v)],
        [],
        multiple=1,
    )
    within = head_count if isinstance(head_count, str) else None
    # A gate on a pair of q and k rows (or a v row and its output column) is seen from both sides: half of each.
    qk_width = builder.add_dimension(
        f"{path}.qk",
        DimensionKind.QK_WIDTH,
        qk,
        [*in_rows(0), *in_rows(1)],
        [[*in_rows(0), *in_rows(1)]],
        multiple=multiple,
        copies=heads,
        within=within,
        scale=0.5,
    )
    v_width = builder.add_dimension(
        f"{path}.v",
        DimensionKind.V_WIDTH,
        v,
        [*in_rows(2), out_columns()],
        [[*in_rows(2), out_columns()]],
        multiple=multiple,
        copies=heads,
        within=within,
        scale=0.5,
    )
    return head_count, qk_width, v_width
