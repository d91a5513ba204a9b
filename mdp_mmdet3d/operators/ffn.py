"""Post-norm feed-forward sub-layer: two linear layers with a ReLU between, addition and norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from mdp_mmdet3d.operators.base import (
    DECODER_COPIES,
    GraphBuilder,
    OperatorKind,
    OperatorSignature,
    Work,
    matrix_work,
)

if TYPE_CHECKING:
    from torch import Tensor


class Ffn(OperatorKind):
    """Feed-forward network on (1, tokens, embed_dims)."""

    name = "ffn"
    roles = ("hidden",)
    attributes = ("tokens", "embed_dims")
    samples: ClassVar[Mapping[str, int | None]] = {"hidden": 5}

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
            hidden = build.node("Relu", [build.linear(x, f"{name}_up", size, widths[0])], f"{name}_relu")
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

        size = signature["embed_dims"]

        class Call(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up, self.down = nn.Linear(size, widths[0]), nn.Linear(widths[0], size)
                self.norm = nn.LayerNorm(size)

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(x + self.down(self.up(x).relu_()))

        return Call(), (torch.randn(1, signature["tokens"], size),)
