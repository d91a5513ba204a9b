"""Attention sub-layer: projections, softmax, output projection, addition and norm."""

from __future__ import annotations

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

SMALLEST_WIDTH = 16
MULTIPLE = 8
"""Of a head, for TensorRT's fused kernel; widths between cost one more kernel."""


def padded_width(qk_width: int, v_width: int) -> int:
    """Width that a head has in a float16 deployment, where zeros make q/k and v equal (`onnx.attention_widths`)."""
    return max(SMALLEST_WIDTH, -(-max(qk_width, v_width) // MULTIPLE) * MULTIPLE)


class Attention(OperatorKind):
    """Attention of (1, queries, embed_dims) to ``keys`` tokens; whether the norm stands in front or behind is no cost.

    ``shared``: the first tokens that are attended to are the queries themselves, so keys and values are made anew in
    every layer. ``packed``: self-attention of a vision transformer, one projection for q, k and v, no positions.
    ``windows``: so many times beside each other, each with a bias per head and pair of tokens; packed ones only.
    """

    name = "attention"
    roles: ClassVar[tuple[str, ...]] = ("heads", "qk_width", "v_width")
    attributes: ClassVar[tuple[str, ...]] = ("queries", "keys", "embed_dims", "shared")
    optional = ("packed", "windows")
    # Latency is convex in the heads.
    samples: ClassVar[Mapping[str, int | None]] = {"heads": None, "qk_width": 2, "v_width": 2}
    whole_roles = frozenset({"heads"})

    def canonical(self, attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
        """Without ``packed`` where it is not, and without ``windows`` where there is one."""
        usual = (("packed", False), ("windows", 1))
        return {name: value for name, value in attributes.items() if (name, value) not in usual}

    def deployed_widths(self, signature: OperatorSignature, widths: tuple[int, ...], precision: str) -> tuple[int, ...]:
        """Padded head widths in float16; a packed projection and a single head are not padded."""
        if precision != "float16" or signature.get("packed", False) or widths[0] == 1:
            return widths
        width = padded_width(*widths[1:])
        return (widths[0], width, width)

    def work(self, signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
        """Four projections, two products per head, softmax, positions and norm."""
        heads, qk_width, v_width = widths
        queries, keys, size = signature["queries"], signature["keys"], signature["embed_dims"]
        windows = signature.get("windows", 1)
        rows = windows * queries
        parts = [
            matrix_work(rows, size, heads * qk_width),
            matrix_work(windows * keys, size, heads * qk_width),
            matrix_work(windows * keys, size, heads * v_width),
            matrix_work(queries, qk_width, keys, windows * heads),
            matrix_work(queries, keys, v_width, windows * heads),
            matrix_work(rows, heads * v_width, size),
        ]
        softmax = (2 if windows == 1 else 4) * windows * heads * queries * keys
        positions = 0 if signature.get("packed", False) else 2 * queries + (2 * keys if signature["shared"] else 0)
        positions_and_norm = 2 * size * (positions or 2 * rows)
        elements = sum(part.elements for part in parts) + softmax + positions_and_norm
        return Work(sum(part.macs for part in parts), elements, len(parts) + 3)

    def graph(self, build: GraphBuilder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
        """`DECODER_COPIES` sub-layers in a row."""
        heads, qk_width, v_width = widths
        queries, keys, size = signature["queries"], signature["keys"], signature["embed_dims"]
        windows = signature.get("windows", 1)
        x = build.input("queries", windows, queries, size)
        if signature.get("packed", False):
            for copy in range(DECODER_COPIES):
                name = f"target{copy}"
                width = heads * (2 * qk_width + v_width)
                packed = build.linear(x, f"{name}_qkv", size, width)
                ends = (0, heads * qk_width, 2 * heads * qk_width, width)
                query, key, value = (
                    _columns(build, packed, f"{name}_{part}", *ends[i : i + 2]) for i, part in enumerate("qkv")
                )
                x = self._attend(build, name, x, (query, key, value), widths, queries, queries, size, windows)
            build.token_sink(x)
            return DECODER_COPIES
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
            projected = (
                build.linear(query, f"{name}_q", size, heads * qk_width),
                build.linear(key, f"{name}_k", size, heads * qk_width),
                build.linear(value, f"{name}_v", size, heads * v_width),
            )
            x = self._attend(build, name, x, projected, widths, queries, keys, size)
        build.token_sink(x)
        return DECODER_COPIES

    @staticmethod
    def _attend(
        build: GraphBuilder,
        name: str,
        x: str,
        projected: tuple[str, str, str],
        widths: tuple[int, ...],
        queries: int,
        keys: int,
        size: int,
        windows: int = 1,
    ) -> str:
        """From projected q, k and v to the stream behind addition and norm."""
        heads, qk_width, v_width = widths
        q = _heads(build, projected[0], (windows, queries, heads, qk_width), (0, 2, 1, 3))
        k = _heads(build, projected[1], (windows, keys, heads, qk_width), (0, 2, 3, 1))
        v = _heads(build, projected[2], (windows, keys, heads, v_width), (0, 2, 1, 3))
        scale = build.constant(f"{name}_scale", np.array(qk_width**-0.5, dtype=np.float32))
        scores = build.node("Mul", [build.node("MatMul", [q, k], f"{name}_product"), scale], f"{name}_scores")
        if windows > 1:
            bias = build.constant(f"{name}_bias", np.full((1, heads, queries, keys), 0.01, dtype=np.float32))
            scores = build.node("Add", [scores, bias], f"{name}_biased")
        weights = build.node("Softmax", [scores], f"{name}_softmax", axis=-1)
        mixed = build.node("MatMul", [weights, v], f"{name}_mixed")
        mixed = build.node("Transpose", [mixed], f"{name}_merged", perm=[0, 2, 1, 3])
        mixed = build.reshape(mixed, f"{name}_flat", windows, queries, heads * v_width)
        out = build.linear(mixed, f"{name}_out", heads * v_width, size)
        return build.layer_norm(build.node("Add", [x, out], f"{name}_sum"), f"{name}_norm", size)

    def torch_call(
        self, signature: OperatorSignature, widths: tuple[int, ...]
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """One sub-layer, in the operations that eager PyTorch runs."""
        import torch
        from torch import nn

        heads, qk_width, v_width = widths
        queries, keys, size = signature["queries"], signature["keys"], signature["embed_dims"]
        shared = signature["shared"]
        if signature.get("packed", False):
            windows = signature.get("windows", 1)
            return _packed_call(size, *widths), (torch.randn(windows, queries, size),)

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


def _columns(build: GraphBuilder, x: str, name: str, start: int, end: int) -> str:
    bounds = [
        build.constant(f"{name}_{part}", np.array([value], dtype=np.int64))
        for part, value in (("start", start), ("end", end), ("axis", 2))
    ]
    return build.node("Slice", [x, *bounds], name)


def _heads(build: GraphBuilder, x: str, shape: tuple[int, int, int, int], order: tuple[int, ...]) -> str:
    """Tokens (windows, T, heads * width) as ``shape`` (windows, T, heads, width), in another order."""
    split = build.reshape(x, f"{x}_split", *shape)
    return build.node("Transpose", [split], f"{x}_heads", perm=list(order))


def _packed_call(size: int, heads: int, qk_width: int, v_width: int) -> Callable[..., Tensor]:
    from torch import nn

    from mdp_mmdet3d.layers import PackedSelfAttention

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            qkv = nn.Linear(size, heads * (2 * qk_width + v_width))
            proj = nn.Linear(heads * v_width, size)
            self.attention = PackedSelfAttention(qkv, proj, heads, qk_width, v_width, qk_width**-0.5)
            self.norm = nn.LayerNorm(size)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(self.norm(x))

    return Call()
