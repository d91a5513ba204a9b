"""How much an operator computes and moves: for estimates and as the yardstick that latency tables must beat."""

from __future__ import annotations

from dataclasses import dataclass

from mdp_mmdet3d.space import OperatorSignature


@dataclass(frozen=True)
class Work:
    """One execution of an operator.

    Attributes:
        macs: Multiply-accumulate operations in matrix products and convolutions.
        elements: Numbers read and written: inputs, weights and outputs of each kernel once.
        kernels: Kernels that run after the usual fusions.
    """

    macs: float
    elements: float
    kernels: int


def operator_work(signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
    """Work of ``signature`` at ``widths``; see `space.WIDTH_ROLES` for their meaning."""
    return _WORK[signature.kind](signature, widths)


def _conv(signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
    ci, co = widths
    batch, height, width = signature["batch"], signature["height"], signature["width"]
    kernel_h, kernel_w, stride = signature["kernel_h"], signature["kernel_w"], signature["stride"]
    rows = (height + 2 * signature["padding"] - kernel_h) // stride + 1
    columns = (width + 2 * signature["padding"] - kernel_w) // stride + 1
    pixels = batch * rows * columns
    weights = co * ci // signature["groups"] * kernel_h * kernel_w
    outputs = pixels * co * (2 if signature["residual"] else 1)
    return Work(pixels * weights, batch * height * width * ci + weights + outputs, 1)


def _max_pool(signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
    pixels = signature["batch"] * signature["height"] * signature["width"]
    return Work(0.0, widths[0] * pixels * (1 + 1 / signature["stride"] ** 2), 1)


def _upsample_add(signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
    pixels = signature["batch"] * signature["height"] * signature["width"]
    return Work(0.0, widths[0] * pixels * (0.25 + 1 + 1), 1)


def _matrix(rows: int, fan_in: int, fan_out: int, copies: int = 1) -> Work:
    elements = copies * (rows * fan_in + fan_in * fan_out + rows * fan_out)
    return Work(copies * rows * fan_in * fan_out, elements, 1)


def _linear(signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
    product = _matrix(signature["tokens"], *widths)
    extra = (signature["norm"] != "none") + (signature["activation"] != "none")
    return Work(product.macs, product.elements + extra * 2 * signature["tokens"] * widths[1], 1 + extra)


def _attention(signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
    heads, qk_width, v_width = widths
    queries, keys, size = signature["queries"], signature["keys"], signature["embed_dims"]
    parts = [
        _matrix(queries, size, heads * qk_width),
        _matrix(keys, size, heads * qk_width),
        _matrix(keys, size, heads * v_width),
        _matrix(queries, qk_width, keys, heads),
        _matrix(queries, keys, v_width, heads),
        _matrix(queries, heads * v_width, size),
    ]
    softmax = 2 * heads * queries * keys
    positions_and_norm = 2 * size * (2 * queries + (2 * keys if signature["shared"] else 0))
    elements = sum(part.elements for part in parts) + softmax + positions_and_norm
    return Work(sum(part.macs for part in parts), elements, len(parts) + 3)


def _ffn(signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
    tokens, size = signature["tokens"], signature["embed_dims"]
    up, down = _matrix(tokens, size, widths[0]), _matrix(tokens, widths[0], size)
    relu_and_norm = 2 * tokens * (widths[0] + 1.5 * size)
    return Work(up.macs + down.macs, up.elements + down.elements + relu_and_norm, 4)


_WORK = {
    "conv": _conv,
    "max_pool": _max_pool,
    "upsample_add": _upsample_add,
    "linear": _linear,
    "attention": _attention,
    "ffn": _ffn,
}
