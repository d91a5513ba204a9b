"""Multi-head attention: heads, and the q/k and v width of a head."""

from __future__ import annotations

from collections.abc import Callable

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
    bias: str = "",
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
        bias: Tensor below ``path`` with a column per head, as of relative positions; none if empty.

    With `SpaceOptions.tie_head_widths`, q/k and v have one dimension, ``path.width``: an equal number of channels, each
    the best by their own ranking, so that as little value as possible is lost.

    Returns:
        Dimension (or dense count, where frozen) of heads, q/k width and v width.
    """
    starts = (0, heads * qk, 2 * heads * qk)

    def in_rows(part: int, width: int = 1, first: int = 0, copies: int | None = None) -> list[TensorAxis]:
        leaves, start = (separate[part], 0) if separate else (packed, starts[part])
        return [TensorAxis(f"{path}.{leaf}", 0, start, width, first, copies) for leaf in leaves]

    def out_columns(width: int = 1, first: int = 0) -> TensorAxis:
        return TensorAxis(f"{path}.{out}", 1, 0, width, first)

    multiple = builder.options.head_width_multiple
    head_count = builder.add_dimension(
        f"{path}.heads",
        DimensionKind.HEADS,
        heads,
        [
            *in_rows(0, qk),
            *in_rows(1, qk),
            *in_rows(2, v),
            out_columns(v),
            *([TensorAxis(f"{path}.{bias}", 1)] if bias else []),
        ],
        [],
        multiple=1,
    )
    within = head_count if isinstance(head_count, str) else None
    if builder.options.tie_head_widths and qk == v:
        width = _add_tied(builder, path, heads, v, in_rows, out_columns, within)
        return head_count, width, width
    if builder.options.tie_head_widths:
        builder.leave(f"{path}.width", f"not tied: the dense q/k width is {qk}, that of v {v}")
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


def _add_tied(
    builder: SpaceBuilder,
    path: str,
    heads: int,
    size: int,
    in_rows: Callable[[int, int, int, int | None], list[TensorAxis]],
    out_columns: Callable[[int, int], TensorAxis],
    within: str | None,
) -> str | int:
    """One width with two copies per head: those of q and k of all heads, then those of v."""
    q, k, v = in_rows(0, 1, 0, heads), in_rows(1, 1, 0, heads), in_rows(2, 1, heads, None)
    out = out_columns(1, heads)
    return builder.add_dimension(
        f"{path}.width",
        DimensionKind.HEAD_WIDTH,
        size,
        [*q, *k, *v, out],
        [[*q, *k], [*v, out]],
        multiple=builder.options.head_width_multiple,
        copies=2 * heads,
        within=within,
        scale=0.5,
    )


def add_deformable_attention(builder: SpaceBuilder, path: str, heads: int) -> str | int:
    """Add the heads of a multi-scale deformable attention under the names of mmcv's.

    Its own class runs with fewer heads: each has rows of ``sampling_offsets``, ``attention_weights`` and
    ``value_proj`` and columns of ``output_proj``.

    Args:
        builder: Receives the dimension.
        path: Path of the attention.
        heads: Dense number of heads.

    Returns:
        The dimension's name, or ``heads`` where it is frozen.
    """
    module = builder.model.get_submodule(path)
    rows: dict[str, list[TensorAxis]] = {}
    for part in ("sampling_offsets", "attention_weights", "value_proj"):
        layer = module.get_submodule(part)
        width = layer.weight.shape[0] // heads
        rows[part] = [TensorAxis(f"{path}.{part}.{leaf}", 0, 0, width) for leaf, _ in layer.named_parameters()]
    columns = TensorAxis(f"{path}.output_proj.weight", 1, 0, module.get_submodule("output_proj").in_features // heads)
    members = [axis for part in rows.values() for axis in part]
    # A gate on a head is seen at its values and at the columns that read them: half of each.
    return builder.add_dimension(
        f"{path}.heads",
        DimensionKind.HEADS,
        heads,
        [*members, columns],
        [[*rows["value_proj"], columns]],
        multiple=1,
        scale=0.5,
    )
