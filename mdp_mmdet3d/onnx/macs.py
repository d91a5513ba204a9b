"""Multiply-accumulates of an ONNX graph with static shapes."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
from onnx import numpy_helper, shape_inference

from mdp_mmdet3d.errors import DeploymentError


def count_macs(path: str | Path) -> int:
    """Multiply-accumulates of all convolutions and matrix products; element-wise work is not counted.

    Args:
        path: Model with static shapes.

    Raises:
        DeploymentError: A shape that is needed cannot be inferred.
    """
    model = shape_inference.infer_shapes(onnx.load(str(path)), data_prop=True)
    graph = model.graph
    shapes = {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
        for v in [*graph.input, *graph.output, *graph.value_info]
    }
    shapes |= {t.name: tuple(t.dims) for t in graph.initializer}
    shapes |= {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t).shape
        for node in graph.node
        if node.op_type == "Constant"
    }
    total = 0
    for node in graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        try:
            first, second, out = (shapes[name] for name in (node.input[0], node.input[1], node.output[0]))
        except KeyError as error:
            raise DeploymentError(f"{path}: the shape of {error} is not known; export with static shapes") from error
        if node.op_type == "Conv":
            total += math.prod(out) * math.prod(second[1:])  # weight (C_out, C_in / groups, k, k)
        elif node.op_type == "MatMul":
            total += math.prod(out) * first[-1]
        else:
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            total += math.prod(out) * first[0 if transposed else 1]
    return total
