"""Chains of linear layers: FFNs, branches, embeddings and conditional norms."""

from __future__ import annotations

from torch import nn

from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.types import DimensionKind, TensorAxis, Width


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


def add_mlp(
    builder: SpaceBuilder,
    mlp: nn.Sequential,
    path: str,
    *,
    tokens: int,
    engine: str,
    input_width: Width | None = None,
) -> None:
    """Add the hidden widths and the cost of a chain of linear layers with norms and ReLUs between them.

    Args:
        builder: Receives dimensions and terms.
        mlp: Linear layers, LayerNorms and activations.
        path: Its path in the model.
        tokens: Rows that it runs on per frame.
        engine: Engine it runs in.
        input_width: Dimension that the first layer reads, where it is prunable.
    """
    linears = [i for i, module in enumerate(mlp) if isinstance(module, nn.Linear)]
    width: Width = input_width if input_width is not None else mlp[linears[0]].in_features
    for position, i in enumerate(linears):
        name, linear = f"{path}.{i}", mlp[i]
        last = position == len(linears) - 1
        between = list(range(i + 1, len(mlp) if last else linears[position + 1]))
        norms = [j for j in between if isinstance(mlp[j], nn.LayerNorm)]
        odd = [j for j in between if not isinstance(mlp[j], (nn.LayerNorm, nn.ReLU, nn.Dropout, nn.Identity))]
        out: str | int = linear.out_features
        if odd or len(norms) > 1 or (norms and not mlp[norms[0]].elementwise_affine):
            # With a fixed width, what follows costs the same in every plan.
            if not last:
                builder.leave(f"{name}.out", f"{type(mlp[(odd or norms)[0]]).__name__} behind it has no cost term")
            norms, between = [], []
        elif not last:
            out = add_hidden(
                builder,
                name,
                (f"{path}.{linears[position + 1]}",),
                linear.out_features,
                f"{path}.{norms[0]}" if norms else None,
            )
        builder.add_term(
            name,
            engine,
            "linear",
            (width, out),
            tokens=tokens,
            norm="layer" if norms else "none",
            activation="relu" if any(isinstance(mlp[j], nn.ReLU) for j in between) else "none",
        )
        width = out


def add_fan_out(builder: SpaceBuilder, first: str, heads: tuple[str, ...], *, tokens: int, engine: str) -> None:
    """Add the hidden width and the cost of one ReLU layer read by one or several linear layers.

    Covers ``reduce -> gamma, beta`` of a conditional norm and ``reduce -> expand`` of a gate.

    Args:
        builder: Receives dimension and terms.
        first: Path of the first linear layer.
        heads: Paths of the linear layers that read its ReLU.
        tokens: Rows per frame.
        engine: Engine.
    """
    linear = builder.model.get_submodule(first)
    hidden = add_hidden(builder, first, heads, linear.out_features)
    builder.add_term(
        first, engine, "linear", (linear.in_features, hidden), tokens=tokens, norm="none", activation="relu"
    )
    for head in heads:
        module = builder.model.get_submodule(head)
        builder.add_term(
            head, engine, "linear", (hidden, module.out_features), tokens=tokens, norm="none", activation="none"
        )
