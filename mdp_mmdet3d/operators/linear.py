"""Linear layer with the norm and activation behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mdp_mmdet3d.operators.base import (
    SOURCE_CHANNELS,
    GraphBuilder,
    OperatorKind,
    OperatorSignature,
    Work,
    matrix_work,
)

if TYPE_CHECKING:
    from torch import Tensor


class Linear(OperatorKind):
    """Linear layer on (1, tokens, in_features); norm: ``"none"``, ``"layer"``; activation: ``"none"``, ``"relu"``."""

    name = "linear"
    roles = ("in_features", "out_features")
    attributes = ("tokens", "norm", "activation")

    def work(self, signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
        """A product; norm and activation each read and write the result."""
        product = matrix_work(signature["tokens"], *widths)
        extra = (signature["norm"] != "none") + (signature["activation"] != "none")
        return Work(product.macs, product.elements + extra * 2 * signature["tokens"] * widths[1], 1 + extra)

    def graph(self, build: GraphBuilder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
        """The layer behind another one."""
        fan_in, fan_out = widths
        x = build.input("seed", 1, signature["tokens"], SOURCE_CHANNELS)
        x = build.linear(build.linear(x, "source", SOURCE_CHANNELS, fan_in), "target", fan_in, fan_out)
        if signature["norm"] == "layer":
            x = build.layer_norm(x, "target_norm", fan_out)
        elif signature["norm"] != "none":
            raise ValueError(f"{signature.key}: norm must be 'none' or 'layer'")
        if signature["activation"] == "relu":
            x = build.node("Relu", [x], "target_relu")
        elif signature["activation"] != "none":
            raise ValueError(f"{signature.key}: activation must be 'none' or 'relu'")
        build.token_sink(x)
        return 1

    def torch_call(
        self, signature: OperatorSignature, widths: tuple[int, ...]
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """Layers in a row."""
        import torch
        from torch import nn

        layers: list[nn.Module] = [nn.Linear(*widths)]
        if signature["norm"] == "layer":
            layers.append(nn.LayerNorm(widths[1]))
        if signature["activation"] == "relu":
            layers.append(nn.ReLU())
        return nn.Sequential(*layers), (torch.randn(1, signature["tokens"], widths[0]),)
