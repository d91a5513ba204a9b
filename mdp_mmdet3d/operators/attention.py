"""Post-norm attention sub-layer: projections, softmax, output projection, addition and norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

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


class Attention(OperatorKind):
    """Attention of (1, queries, embed_dims) to ``keys`` tokens.

    ``shared``: the first tokens that are attended to are the queries themselves, so keys and values are made anew in
    every layer.
    """

    name = "attention"
    roles = ("heads", "qk_width", "v_width")
    attributes = ("queries", "keys", "embed_dims", "shared")
    # Latency is convex in the heads.
    samples: ClassVar[Mapping[str, int | None]] = {"heads": None, "qk_width": 2, "v_width": 2}
    whole_roles = frozenset({"heads"})

    def work(self, signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
        """Four projections, two products per head, softmax, positions and norm."""
        heads, qk_width, v_width = widths
        queries, keys, size = signature["queries"], signature["keys"], signature["embed_dims"]
        parts = [
            matrix_work(queries, size, heads * qk_width),
            matrix_work(keys, size, heads * qk_width),
            matrix_work(keys, size, heads * v_width),
            matrix_work(queries, qk_width, keys, heads),
            matrix_work(queries, keys, v_width, heads),
            matrix_work(queries, heads * v_width, size),
        ]
        softmax = 2 * heads * queries * keys
        positions_and_norm = 2 * size * (2 * queries + (2 * keys if signature["shared"] else 0))
        elements = sum(part.elements for part in parts) + softmax + positions_and_norm
        return Work(sum(part.macs for part in parts), elements, len(parts) + 3)

    def graph(self, build: GraphBuilder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
        """`DECODER_COPIES` sub-layers in a row."""
        heads, qk_width, v_width = widths
        queries, keys, size = signature["queries"], signature["keys"], signature["embed_dims"]
        x = build.input("queries", 1, queries, size)
        query_position = build.input("query_position", 1, queries, size)
        key_position = build.input("key_position", 1, keys, size)
        memory = (
            build.input("memory", 1, keys - queries if signature["shared"] else keys, size)
            if not signature["shared"] or keys > queries
            else ""
        )
        if not signature["shared"]:
            shared_key = build.node("Add", [memory, key_position], "source_key")
        for copy in range(DECODER_COPIES):
            name = f"target{copy}"
            if signature["shared"]:
                value = build.node("Concat", [x, memory], f"{name}_value_in", axis=1) if memory else x
                key = build.node("Add", [value, key_position], f"{name}_key_in")
            else:
                key, value = shared_key, memory
            query = build.node("Add", [x, query_position], f"{name}_query_in")
            q = build.linear(query, f"{name}_q", size, heads * qk_width)
            q = _heads(build, q, queries, heads, qk_width, (0, 2, 1, 3))
            k = build.linear(key, f"{name}_k", size, heads * qk_width)
            k = _heads(build, k, keys, heads, qk_width, (0, 2, 3, 1))
            v = build.linear(value, f"{name}_v", size, heads * v_width)
            v = _heads(build, v, keys, heads, v_width, (0, 2, 1, 3))
            scale = build.constant(f"{name}_scale", np.array(qk_width**-0.5, dtype=np.float32))
            scores = build.node("Mul", [build.node("MatMul", [q, k], f"{name}_product"), scale], f"{name}_scores")
            weights = build.node("Softmax", [scores], f"{name}_softmax", axis=-1)
            mixed = build.node(
                "Transpose",
                [build.node("MatMul", [weights, v], f"{name}_mixed")],
                f"{name}_merged",
                perm=[0, 2, 1, 3],
            )
            mixed = build.reshape(mixed, f"{name}_flat", 1, queries, heads * v_width)
            out = build.linear(mixed, f"{name}_out", heads * v_width, size)
            x = build.layer_norm(build.node("Add", [x, out], f"{name}_sum"), f"{name}_norm", size)
        build.token_sink(x)
        return DECODER_COPIES

    def torch_call(
        self, signature: OperatorSignature, widths: tuple[int, ...]
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """One sub-layer, in the operations that eager PyTorch runs."""
        import torch
        from torch import nn

        heads, qk_width, v_width = widths
        queries, keys, size = signature["queries"], signature["keys"], signature["embed_dims"]
        shared = signature["shared"]

        class Call(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k = (nn.Linear(size, heads * qk_width) for _ in range(2))
                self.v, self.out = nn.Linear(size, heads * v_width), nn.Linear(heads * v_width, size)
                self.norm = nn.LayerNorm(size)

            def forward(self, x: Tensor, query_position: Tensor, key_position: Tensor, memory: Tensor) -> Tensor:
                value = torch.cat((x, memory), dim=1) if shared else memory
                key = value + key_position if shared else key_position
                parts = (self.q(x + query_position), self.k(key), self.v(value))
                q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
                weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
                return self.norm(x + self.out((weights @ v).transpose(1, 2).flatten(2)))

        shapes = (queries, queries, keys, keys - queries if shared else keys)
        return Call(), tuple(torch.randn(1, n, size) for n in shapes)


def _heads(build: GraphBuilder, x: str, tokens: int, heads: int, width: int, order: tuple[int, ...]) -> str:
    split = build.reshape(x, f"{x}_split", 1, tokens, heads, width)
    return build.node("Transpose", [split], f"{x}_heads", perm=list(order))
