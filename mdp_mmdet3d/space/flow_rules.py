"""What the operators of PyTorch do to the order of channels: which indices of which axes are tied."""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from mdp_mmdet3d.space.operations import tensors_in


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_POINTWISE = _names(
    "abs add addcdiv addcmul alias bitwise_and bitwise_not bitwise_or clamp clamp_max clamp_min clone copy cos detach "
    "div dropout elu eq erf exp expand floor ge gelu gt hardsigmoid hardswish hardtanh le leaky_relu lift_fresh log "
    "log1p logical_and logical_not logical_or lt masked_fill maximum minimum mul ne neg pow reciprocal relu remainder "
    "rsqrt rsub sigmoid silu sin softplus sqrt square sub tanh to where zeros_like ones_like empty_like full_like "
    "rand_like randn_like native_dropout contiguous fill zero true_divide threshold mish log_sigmoid_forward "
    "logical_xor nan_to_num isnan isinf sign _to_copy __and__ __or__ __xor__"
)
_RESHAPED = _names("view _unsafe_view reshape _reshape_alias unsqueeze squeeze unflatten flatten")
_POOLED = _names(
    "max_pool2d_with_indices max_pool2d avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d upsample_nearest2d "
    "upsample_bilinear2d upsample_bicubic2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa adaptive_max_pool2d "
    "_upsample_nearest_exact2d"
)
_REDUCED = _names("mean sum amax amin var std var_mean max min argmax argmin any all prod norm")
_ALONG = _names("_softmax _log_softmax cumsum sort topk flip roll cumprod logcumsumexp")
_FRESH = _names("zeros ones empty full arange linspace scalar_tensor new_zeros new_ones new_empty new_full eye")


class TiedIndices(TorchDispatchMode):
    """Ties indices along the axes of tensors while operators run; those that it does not know mark what they read.

    Attributes:
        starts: Per tensor and axis, the number of its first index.
        count: Indices in all.
        edges: Pairs that are tied.
        marks: Indices that are not understood, and why.
        in_norm: Whether what runs is the operator of a norm without weights, whose width can be changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.starts: MutableMapping[Tensor, list[int]] = WeakTensorKeyDictionary()
        self.count = 0
        self.edges: list[tuple[np.ndarray, np.ndarray]] = []
        self.marks: list[tuple[np.ndarray, str]] = []
        self.in_norm = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        found = func(*args, **named)
        name = func._schema.name.rpartition("::")[2]
        name = name.rstrip("_") if not name.startswith("__") else name
        try:
            self._rule(name, func, args, named, found)
        except _Unknown:
            for tensor in (*tensors_in([args, named]), *tensors_in(found)):
                self._mark(tensor, range(tensor.ndim), f"passes {name}, which tracing does not follow")
        return found

    def _axis(self, tensor: Tensor, axis: int) -> np.ndarray:
        """Nodes of the indices along an axis."""
        starts = self.starts.get(tensor)
        if starts is None:
            starts = []
            for length in tensor.shape:
                starts.append(self.count)
                self.count += length
            self.starts[tensor] = starts
        axis %= tensor.ndim
        return np.arange(starts[axis], starts[axis] + tensor.shape[axis])

    def tie(self, tensor: Tensor, axis: int, other: Tensor, other_axis: int) -> None:
        """Tie the indices along two axes, pair by pair, if they are equally long."""
        here, there = self._axis(tensor, axis), self._axis(other, other_axis)
        if len(here) == len(there):
            self.edges.append((here, there))

    def _mark(self, tensor: Tensor, axes: Sequence[int] | range, reason: str) -> None:
        for axis in axes:
            if tensor.shape[axis] > 1:
                self.marks.append((self._axis(tensor, axis), reason))

    # what operators do

    def _rule(self, name: str, func: Any, args: Any, named: dict[str, Any], found: Any) -> None:
        outputs = list(tensors_in(found))
        if name in _FRESH or not outputs:
            return
        if name in _POINTWISE:
            self._broadcast(list(tensors_in([args, named])), outputs[0])
        elif name in _RESHAPED:
            self._reshape(args[0], outputs[0])
        elif name in ("permute", "transpose", "t", "numpy_T"):
            self._permute(name, args, outputs[0])
        elif name in ("split", "split_with_sizes", "unbind", "unsafe_split", "unsafe_chunk", "chunk"):
            self._split(args[0], _given(func, args, named, "dim", 0), outputs)
        elif name in ("slice", "select"):
            self._slice(name, func, args, named, outputs[0])
        elif name in ("cat", "stack"):
            self._join(name, args[0], _given(func, args, named, "dim", 0), outputs[0])
        elif name in ("mm", "bmm", "addmm", "baddbmm"):
            self._product(args[-2:], args[0] if len(args) > 2 else None, outputs[0])
        elif name in ("convolution", "_convolution"):
            self._convolution(args, outputs[0])
        elif name in ("native_layer_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"):
            self._norm(name, args, outputs[0])
        elif name == "native_group_norm":
            self._group_norm(args, outputs[0])
        elif name in _POOLED:
            for axis in range(outputs[0].ndim - 2):
                self.tie(args[0], axis, outputs[0], axis)
        elif name in _REDUCED:
            self._reduce(func, args, named, outputs)
        elif name in _ALONG:
            axes = _given(func, args, named, "dims", None) or _given(func, args, named, "dim", -1)
            axes = {axis % args[0].ndim for axis in ([axes] if isinstance(axes, int) else axes)}
            for output in outputs:
                for axis in range(args[0].ndim):
                    if axis not in axes:
                        self.tie(args[0], axis, output, axis)
                self._mark(output, list(axes), name)
            self._mark(args[0], list(axes), name)
        elif name == "constant_pad_nd":
            self._pad(args[0], args[1], outputs[0])
        elif name == "repeat":
            for axis, times in zip(range(-args[0].ndim, 0), args[1][-args[0].ndim :] if args[0].ndim else ()):
                if times == 1:
                    self.tie(args[0], axis, outputs[0], axis)
                else:
                    self._mark(args[0], [axis], "is repeated")
                    self._mark(outputs[0], [axis], "is a repetition")
        elif name == "embedding":
            self.tie(args[0], 1, outputs[0], -1)
        elif name in ("index", "index_select", "gather"):
            self._index(name, args, outputs[0])
        elif name.startswith("_scaled_dot_product"):
            query, key, value = args[:3]
            for axis in (0, 1, 2):
                self.tie(query, axis, outputs[0], axis)
            self.tie(query, -1, key, -1)
            self.tie(value, -1, outputs[0], -1)
        else:
            raise _Unknown

    def _broadcast(self, inputs: Sequence[Tensor], output: Tensor) -> None:
        for tensor in inputs:
            for axis in range(1, tensor.ndim + 1):
                if axis <= output.ndim and tensor.shape[-axis] > 1:
                    self.tie(tensor, -axis, output, -axis)

    def _reshape(self, tensor: Tensor, output: Tensor) -> None:
        for before, after in _axis_groups(tensor.shape, output.shape):
            if len(before) == len(after) == 1:
                self.tie(tensor, before[0], output, after[0])
            else:
                self._mark(tensor, before, "is reshaped into other axes")
                self._mark(output, after, "is made of other axes by a reshape")

    def _permute(self, name: str, args: Any, output: Tensor) -> None:
        order = list(range(args[0].ndim))
        if name == "permute":
            order = [axis % args[0].ndim for axis in args[1]]
        elif name == "transpose":
            first, second = args[1] % args[0].ndim, args[2] % args[0].ndim
            order[first], order[second] = second, first
        else:
            order.reverse()
        for axis, source in enumerate(order):
            self.tie(args[0], source, output, axis)

    def _split(self, tensor: Tensor, dim: int, outputs: Sequence[Tensor]) -> None:
        dim, start = dim % tensor.ndim, 0
        for output in outputs:
            unbound = output.ndim < tensor.ndim
            for axis in range(tensor.ndim):
                if axis != dim:
                    self.tie(tensor, axis, output, axis - (unbound and axis > dim))
            if not unbound:
                part = self._axis(tensor, dim)[start : start + output.shape[dim]]
                self.edges.append((part, self._axis(output, dim)))
                start += output.shape[dim]

    def _slice(self, name: str, func: Any, args: Any, named: dict[str, Any], output: Tensor) -> None:
        tensor, dim = args[0], _given(func, args, named, "dim", 0) % args[0].ndim
        if name == "select":
            for axis in range(tensor.ndim):
                if axis != dim:
                    self.tie(tensor, axis, output, axis - (axis > dim))
            return
        start, end, step = (
            _given(func, args, named, key, value) for key, value in (("start", 0), ("end", None), ("step", 1))
        )
        for axis in range(tensor.ndim):
            if axis != dim:
                self.tie(tensor, axis, output, axis)
        self.edges.append((self._axis(tensor, dim)[slice(start, end, step)], self._axis(output, dim)))

    def _pad(self, tensor: Tensor, sizes: Sequence[int], output: Tensor) -> None:
        for axis in range(tensor.ndim):
            place = 2 * (tensor.ndim - 1 - axis)
            before, after = (*sizes, *[0] * (2 * tensor.ndim))[place : place + 2]
            if min(before, after) < 0:
                self._mark(tensor, [axis], "is cropped")
                continue
            self.edges.append((self._axis(tensor, axis), self._axis(output, axis)[before:][: tensor.shape[axis]]))

    def _join(self, name: str, tensors: Sequence[Tensor], dim: int, output: Tensor) -> None:
        dim, start = dim % output.ndim, 0
        for tensor in tensors:
            if name == "cat" and tensor.numel() == 0 and tensor.ndim == 1:
                continue
            for axis in range(tensor.ndim):
                target = axis + (name == "stack" and axis >= dim)
                if target != dim:
                    self.tie(tensor, axis, output, target)
            if name == "cat":
                part = self._axis(output, dim)[start : start + tensor.shape[dim]]
                self.edges.append((self._axis(tensor, dim), part))
                start += tensor.shape[dim]

    def _product(self, factors: Sequence[Tensor], added: Tensor | None, output: Tensor) -> None:
        left, right = factors
        self.tie(left, -1, right, -2)
        self.tie(left, -2, output, -2)
        self.tie(right, -1, output, -1)
        if left.ndim == 3:
            self.tie(left, 0, right, 0)
            self.tie(left, 0, output, 0)
        if added is not None:
            self._broadcast([added], output)

    def _convolution(self, args: Any, output: Tensor) -> None:
        tensor, weight, bias = args[:3]
        transposed, groups = args[6], args[8]
        made, read = (1, 0) if transposed else (0, 1)
        self.tie(tensor, 0, output, 0)
        if groups == 1:
            self.tie(tensor, 1, weight, read)
            self.tie(output, 1, weight, made)
        elif groups == tensor.shape[1] == output.shape[1] and not transposed:
            self.tie(tensor, 1, weight, 0)
            self.tie(output, 1, weight, 0)
        else:
            for part, axes in ((tensor, [1]), (output, [1]), (weight, [0, 1])):
                self._mark(part, axes, "passes a grouped convolution")
        if bias is not None:
            self.tie(output, 1, bias, 0)

    def _norm(self, name: str, args: Any, output: Tensor) -> None:
        tensor, layer = args[0], name == "native_layer_norm"
        weights = args[2:4] if layer else args[1:5]
        axis = -1 if layer else 1
        for place in range(tensor.ndim):
            self.tie(tensor, place, output, place)
        for weight in weights:
            if weight is not None and weight.ndim == 1:
                self.tie(tensor, axis, weight, 0)
        if not self.in_norm and (weights[0] is None or weights[0].ndim != 1):
            axes = [axis] if not layer else range(tensor.ndim - len(args[1]), tensor.ndim)
            self._mark(tensor, axes, "is normalised over several axes, or without weight and bias")

    def _group_norm(self, args: Any, output: Tensor) -> None:
        tensor, weight, bias, groups = args[0], args[1], args[2], args[6]
        for axis in range(tensor.ndim):
            self.tie(tensor, axis, output, axis)
        channels = self._axis(tensor, 1)
        blocks = channels.reshape(groups, -1)
        self.edges.append((np.repeat(blocks[:, 0], blocks.shape[1] - 1), blocks[:, 1:].ravel()))
        for part in (weight, bias):
            if part is not None:
                self.tie(tensor, 1, part, 0)
        if weight is None:
            self._mark(tensor, [1], "is normalised without weight and bias")

    def _reduce(self, func: Any, args: Any, named: dict[str, Any], outputs: Sequence[Tensor]) -> None:
        tensor = args[0]
        axes = _given(func, args, named, "dim", None)
        axes = list(range(tensor.ndim)) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
        axes = [axis % tensor.ndim for axis in axes]
        self._mark(tensor, axes, "is reduced to one number")
        for output in outputs:
            kept = output.ndim == tensor.ndim
            left = [axis for axis in range(tensor.ndim) if axis not in axes]
            for place, axis in enumerate(left):
                if kept or place < output.ndim:
                    self.tie(tensor, axis, output, axis if kept else place)

    def _index(self, name: str, args: Any, output: Tensor) -> None:
        tensor = args[0]
        if name == "index":
            given = [place for place, index in enumerate(args[1]) if index is not None]
            if len(given) != 1:
                raise _Unknown
            dim, index = given[0], args[1][given[0]]
            width = 1 if index.dtype == torch.bool else index.ndim
            span = index.ndim if index.dtype == torch.bool else 1
        else:
            dim, span, width = args[1] % tensor.ndim, 1, 1
        for axis in range(tensor.ndim):
            if axis < dim:
                self.tie(tensor, axis, output, axis)
            elif axis >= dim + span:
                self.tie(tensor, axis, output, axis - span + width)
        self._mark(tensor, range(dim, dim + span), "is picked from")


class _Unknown(Exception):
    """An operator without a rule."""


def _given(func: Any, args: Any, named: dict[str, Any], key: str, default: Any) -> Any:
    """Value of an argument of an operator, by position or name."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == key:
            if place < len(args):
                return args[place]
            if key in named:
                return named[key]
            return default
    return default


def _axis_groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Axes of two shapes with equal products, in the finest partition; axes of length 1 are left out."""
    left = [axis for axis, length in enumerate(before) if length != 1]
    right = [axis for axis, length in enumerate(after) if length != 1]
    while left and right:
        one, other = [left.pop(0)], [right.pop(0)]
        while True:
            products = math.prod(before[axis] for axis in one), math.prod(after[axis] for axis in other)
            if products[0] == products[1]:
                break
            (side, rest) = (one, left) if products[0] < products[1] else (other, right)
            if not rest:
                break
            side.append(rest.pop(0))
        yield one, other
