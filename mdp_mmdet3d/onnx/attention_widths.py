"""Equal head widths for TensorRT's fused attention kernel, which takes no other.

TensorRT-RTX 1.7 runs an attention in one kernel, without its score matrix in memory, only if queries, keys and
values have heads of one width (8 is too narrow, 12 is not). A pruned attention may have two widths; zero columns
change neither scores nor sums.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.operators.attention import padded_width


@dataclass(frozen=True)
class _Linear:
    """A linear layer with constant weights: ``MatMul``, ``Add(MatMul)`` or ``Gemm``.

    Attributes:
        node: MatMul or Gemm; its input 1 is the weight.
        transposed: Whether the weight is (out, in).
        bias: The node that adds the bias and the position of its input; None without bias.
    """

    node: onnx.NodeProto
    transposed: bool
    bias: tuple[onnx.NodeProto, int] | None


@dataclass(frozen=True)
class _Projection:
    """A linear layer whose output is reshaped to (1, tokens, heads, width)."""

    linear: _Linear
    reshape: onnx.NodeProto
    heads: int
    width: int


def pad_attention(graph: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Pad the head widths of every attention with zeros to one width.

    It is the next multiple of 8 of the larger of the two, 16 at least (`padded_width`). The projections gain a few
    columns of work. Attentions of one such width, as all dense ones, are left alone, and so are those of a single head,
    which TensorRT fuses at no width, and what has another form than `projects.streampetr.attention` exports.

    Args:
        graph: float32 graph with static shapes.

    Returns:
        A new graph that computes the same, and the names of the widened attentions' softmax nodes.

    Raises:
        DeploymentError: The result is not a valid graph.
    """
    padded = copy.deepcopy(graph)
    editor = _Editor(padded.graph)
    names = tuple(node.name for node in padded.graph.node if node.op_type == "Softmax" and editor.widen(node))
    if not names:
        return padded, ()
    editor.drop_unused()
    del padded.graph.value_info[:]  # they hold the old shapes
    try:
        onnx.checker.check_model(padded, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise DeploymentError(f"attention with padded heads is not a valid graph: {error}") from error
    return padded, names


class _Editor:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._producers = {name: node for node in graph.node for name in node.output}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)

    def widen(self, softmax: onnx.NodeProto) -> bool:
        """Pad the attention around a softmax; False if it needs none or has another form."""
        scores = self._producer(softmax.input[0], "MatMul")
        weighted = self._only_user(softmax.output[0], "MatMul")
        if scores is None or weighted is None:
            return False
        query, key, value = (self._projection(name) for name in (*scores.input, weighted.input[1]))
        back = self._only_user(weighted.output[0], "Transpose")
        flat = back and self._only_user(back.output[0], "Reshape")
        out = flat and self._only_user(flat.output[0], "MatMul", "Gemm")
        if query is None or key is None or value is None or flat is None or out is None:
            return False
        if not {flat.input[1], out.input[1]} <= self._constants.keys() or not query.heads == key.heads == value.heads:
            return False
        if query.heads == 1:
            return False
        width = padded_width(query.width, value.width)
        if query.width == value.width == width:
            return False
        for projection in (query, key, value):
            if projection.width < width:
                self._widen_projection(projection, width)
        if value.width < width:
            self._pad_weight(_Linear(out, _is_transposed(out), None), value.heads, value.width, width, rows=True)
            shape = self._array(flat.input[1]).copy()
            shape[-1] = value.heads * width
            self._replace(flat, 1, shape)
        return True

    def drop_unused(self) -> None:
        """Remove initializers that no node reads any more."""
        used = {name for node in self._graph.node for name in node.input}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in used]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)

    def _projection(self, name: str) -> _Projection | None:
        node = self._producers.get(name)
        if node is not None and node.op_type == "Mul":  # the scale of the scores
            node = self._producers.get(node.input[0])
        if node is None or node.op_type != "Transpose":
            return None
        reshape = self._producer(node.input[0], "Reshape")
        if reshape is None or reshape.input[1] not in self._constants:
            return None
        shape = self._array(reshape.input[1])
        linear = self._linear(reshape.input[0])
        if linear is None or len(shape) != 4:
            return None
        heads, width = int(shape[2]), int(shape[3])
        columns = self._array(linear.node.input[1]).shape[0 if linear.transposed else -1]
        # Another reader of the projection would see the zeros.
        inner = [linear.node, reshape, *([linear.bias[0]] if linear.bias else [])]
        if columns != heads * width or any(len(self._users[part.output[0]]) != 1 for part in inner):
            return None
        return _Projection(linear, reshape, heads, width)

    def _linear(self, name: str) -> _Linear | None:
        """The linear layer that ends in a tensor."""
        node = self._producers.get(name)
        bias = None
        if node is not None and node.op_type == "Add":
            index = next((i for i, operand in enumerate(node.input) if operand in self._constants), None)
            if index is None:
                return None
            bias = (node, index)
            node = self._producer(node.input[1 - index], "MatMul")
        if node is None or node.op_type not in ("MatMul", "Gemm") or node.input[1] not in self._constants:
            return None
        if node.op_type == "Gemm" and len(node.input) > 2:
            bias = (node, 2)
        if bias is not None and bias[0].input[bias[1]] not in self._constants:
            return None
        return _Linear(node, _is_transposed(node), bias)

    def _widen_projection(self, projection: _Projection, width: int) -> None:
        heads, old, linear = projection.heads, projection.width, projection.linear
        self._pad_weight(linear, heads, old, width, rows=False)
        if linear.bias is not None:
            node, index = linear.bias
            bias = self._array(node.input[index]).reshape(heads, old)
            self._replace(node, index, _pad(bias, 1, width).reshape(-1))
        shape = self._array(projection.reshape.input[1]).copy()
        shape[3] = width
        self._replace(projection.reshape, 1, shape)

    def _pad_weight(self, linear: _Linear, heads: int, old: int, width: int, *, rows: bool) -> None:
        """Insert zeros behind each head's rows (in) or columns (out) of an (in, out) weight, or of its transpose."""
        weight = self._array(linear.node.input[1])
        first = rows != linear.transposed  # heads are on the first axis
        shape = (heads, old, -1) if first else (weight.shape[0], heads, old)
        padded = _pad(weight.reshape(shape), 1 if first else 2, width)
        flat = (heads * width, -1) if first else (-1, heads * width)
        self._replace(linear.node, 1, padded.reshape(flat))

    def _replace(self, node: onnx.NodeProto, index: int, array: np.ndarray) -> None:
        """Give one input of one node a constant of its own: others may share the old one."""
        name = f"{node.name}.padded_{index}"
        tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
        self._graph.initializer.append(tensor)
        self._constants[name] = tensor
        node.input[index] = name

    def _array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self._constants[name])

    def _producer(self, name: str, op_type: str) -> onnx.NodeProto | None:
        node = self._producers.get(name)
        return node if node is not None and node.op_type == op_type else None

    def _only_user(self, name: str, *op_types: str) -> onnx.NodeProto | None:
        users = self._users.get(name, [])
        return users[0] if len(users) == 1 and users[0].op_type in op_types else None


def _is_transposed(linear: onnx.NodeProto) -> bool:
    return any(attribute.name == "transB" and attribute.i == 1 for attribute in linear.attribute)


def _pad(array: np.ndarray, axis: int, width: int) -> np.ndarray:
    extent = [(0, 0)] * array.ndim
    extent[axis] = (0, width - array.shape[axis])
    return np.pad(array, extent)
