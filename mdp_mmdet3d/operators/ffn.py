"""Feed-forward sub-layer: two linear layers with an activation between, addition and norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mdp_mmdet3d.operators.base import (
    DECODER_COPIES,
    Attribute,
    GraphBuilder,
    OperatorKind,
    OperatorSignature,
    Work,
    matrix_work,
)

if TYPE_CHECKING:
    from torch import Tensor


class Ffn(OperatorKind):
    """Feed-forward network on (1, tokens, embed_dims); ``activation`` is ReLU unless it says ``"gelu"``."""

    name = "ffn"
    roles: ClassVar[tuple[str, ...]] = ("hidden",)
    attributes: ClassVar[tuple[str, ...]] = ("tokens", "embed_dims")
    optional = ("activation",)
    samples: ClassVar[Mapping[str, int | None]] = {"hidden": 5}

    def canonical(self, attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
        """Without the usual activation."""
        return {name: value for name, value in attributes.items() if (name, value) != ("activation", "relu")}

    def work(self, signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
        """Two products, ReLU, addition and norm."""
        tokens, size = signature["tokens"], signature["embed_dims"]
        up, down = matrix_work(tokens, size, widths[0]), matrix_work(tokens, widths[0], size)
        relu_and_norm = 2 * tokens * (widths[0] + 1.5 * size)
        return Work(up.macs + down.macs, up.elements + down.elements + relu_and_norm, 4)

    def graph(self, build: GraphBuilder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
        """`DECODER_COPIES` sub-layers in a row."""
        size = signature["embed_dims"]
        x = build.input("queries", 1, signature["tokens"], size)
        for copy in range(DECODER_COPIES):
            name = f"target{copy}"
            up = build.linear(x, f"{name}_up", size, widths[0])
            gelu = signature.get("activation", "relu") == "gelu"
            hidden = _gelu(build, up, name) if gelu else build.node("Relu", [up], f"{name}_relu")
            out = build.linear(hidden, f"{name}_down", widths[0], size)
            x = build.layer_norm(build.node("Add", [x, out], f"{name}_sum"), f"{name}_norm", size)
        build.token_sink(x)
        return DECODER_COPIES

    def torch_call(
        self, signature: OperatorSignature, widths: tuple[int, ...]
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """One sub-layer."""
        import torch
        from torch import nn

        size, gelu = signature["embed_dims"], signature.get("activation", "relu") == "gelu"

        class Call(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up, self.down = nn.Linear(size, widths[0]), nn.Linear(widths[0], size)
                self.norm = nn.LayerNorm(size)

            def forward(self, x: Tensor) -> Tensor:
                hidden = self.up(x)
                hidden = nn.functional.gelu(hidden) if gelu else hidden.relu_()
                return self.norm(x + self.down(hidden))

        return Call(), (torch.randn(1, signature["tokens"], size),)


def _gelu(build: GraphBuilder, x: str, name: str) -> str:
    """x/2 (1 + erf(x / sqrt 2)), as exporters write it; runtimes fuse it."""
    root, one, half = (
        build.constant(f"{name}_{part}", np.array(value, dtype=np.float32))
        for part, value in (("root", math.sqrt(2)), ("one", 1), ("half", 0.5))
    )
    inner = build.node("Erf", [build.node("Div", [x, root], f"{name}_scaled")], f"{name}_erf")
    outer = build.node("Add", [inner, one], f"{name}_shifted")
    return build.node("Mul", [build.node("Mul", [x, outer], f"{name}_gated"), half], f"{name}_gelu")
