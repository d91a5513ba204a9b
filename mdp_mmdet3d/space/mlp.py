"""Hidden widths of chains of linear layers: FFNs, branches, embeddings and conditional norms."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.types import DimensionKind, TensorAxis


def add_hidden(
    builder: SpaceBuilder, producer: str, consumers: tuple[str, ...], size: int, norm: str | None = None
) -> str | int:
    """Add the hidden width between a linear layer and those that read it.

    Args:
        builder: Receives the dimension.
        producer: Path of the linear layer whose rows are the hidden units.
        consumers: Paths of the linear layers whose columns read them.
        size: Dense count.
        norm: Path of an affine LayerNorm between them; its gamma and beta are scored instead of the rows.

    Returns:
        The dimension's name, or ``size`` if it is frozen.
    """
    leaves = [leaf for leaf, _ in builder.model.get_submodule(producer).named_parameters(recurse=False)]
    rows = [TensorAxis(f"{producer}.{leaf}", 0) for leaf in leaves]
    affine = [TensorAxis(f"{norm}.{leaf}", 0) for leaf in ("weight", "bias")] if norm else []
    columns = [TensorAxis(f"{consumer}.weight", 1) for consumer in consumers]
    return builder.add_dimension(
        f"{producer}.out", DimensionKind.HIDDEN, size, [*rows, *affine, *columns], [affine or rows]
    )


def add_mlp(builder: SpaceBuilder, mlp: nn.Sequential, path: str) -> None:
    """Add the hidden widths of a chain of linear layers with norms and activations between them.

    Args:
        builder: Receives the dimensions.
        mlp: Linear layers, LayerNorms and modules without parameters.
        path: Its path in the model.
    """
    linears = [i for i, module in enumerate(mlp) if isinstance(module, nn.Linear)]
    for first, last in pairwise(linears):
        between = [i for i in range(first + 1, last) if next(mlp[i].parameters(), None) is not None]
        between += [i for i in range(first + 1, last) if isinstance(mlp[i], nn.LayerNorm) and i not in between]
        norm = between[0] if between else None
        name = f"{path}.{first}"
        if norm is not None and (len(between) > 1 or not getattr(mlp[norm], "elementwise_affine", False)):
            builder.leave(f"{name}.out", f"the {type(mlp[norm]).__name__} behind it cannot be cut")
            continue
        columns = (f"{path}.{last}",)
        add_hidden(builder, name, columns, mlp[first].out_features, None if norm is None else f"{path}.{norm}")
