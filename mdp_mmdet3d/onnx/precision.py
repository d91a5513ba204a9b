"""Reduced precision as a step from ONNX to ONNX: no builder flag means the same in every TensorRT.

float16 goes where the work is, the learned layers. Everything whose range or resolution float16 does not have stays
float32: poses, points, ages and the memory, inverse sigmoid, sine embeddings, the box branch, softmax, sigmoid,
layer norms and TopK (docs/deployment.md, section 1.1). Inputs and outputs stay float32, so hosts do not change.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.onnx.initializers import module_path

ISLAND_OPS = frozenset(
    {"Softmax", "Sigmoid", "LayerNormalization", "ReduceMean", "ReduceMax", "Pow", "Sqrt", "Exp", "Log", "Sin", "Cos",
     "TopK", "GatherElements", "Clip", "IsNaN", "Cast", "Constant", "ConstantOfShape"}
)  # fmt: skip
"""Operators that stay float32 wherever they are."""

ISLAND_MODULES = frozenset({"reg_branches"})
"""Modules that stay float32: 1e-3 of the box branch's range is decimetres."""

FLOAT32_INPUTS = {"Resize": (1, 2)}
"""Positions of inputs that ONNX keeps in float32 whatever the element type."""

FLOAT16_MAX = 65504.0
SUFFIX = "__float16"


def to_float16(graph: onnx.ModelProto, name: str, islands: set[str] | None = None) -> onnx.ModelProto:
    """Convert an engine's learned layers to float16.

    Args:
        graph: float32 engine with named nodes.
        name: ``"image_encoder"`` or ``"head"``; ``"position_embedding"`` runs once per rig and is returned as it is.

        islands: Names of the nodes that stay float32; default: those of `float32_nodes`.

    Returns:
        A new graph with float32 inputs and outputs.

    Raises:
        DeploymentError: A weight does not fit into float16, or no node would be converted.
    """
    if name == "position_embedding":
        return copy.deepcopy(graph)
    islands = float32_nodes(graph, name) if islands is None else islands
    if len(islands) == len(graph.graph.node):
        raise DeploymentError(f"no node of {name} is in a learned module; was it exported by this package?")
    _check_range(graph, islands, name)
    inferred = shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True).graph
    floats = {
        value.name
        for value in [*inferred.value_info, *inferred.input, *inferred.output]
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    converted = copy.deepcopy(graph)
    del converted.graph.node[:]
    del converted.graph.value_info[:]
    rewriter = _Rewriter(graph, floats)
    converted.graph.node.extend(rewriter.rewrite(islands))
    converted.graph.initializer.extend(rewriter.weights)
    _drop_unused(converted.graph)
    try:
        onnx.checker.check_model(converted, full_check=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
        raise DeploymentError(f"{name} in float16 is not a valid graph: {error}") from error
    return converted


class _Rewriter:
    """A tensor keeps its name in float32 and has a twin with a suffix in float16; casts are made where one is read."""

    def __init__(self, graph: onnx.ModelProto, floats: set[str]) -> None:
        self._nodes = graph.graph.node
        self._initializers = {tensor.name: tensor for tensor in graph.graph.initializer}
        self._outputs = {value.name for value in graph.graph.output}
        self._floats = floats
        self._made: set[str] = set()
        self.weights: list[onnx.TensorProto] = []

    def rewrite(self, islands: set[str]) -> list[onnx.NodeProto]:
        """Nodes of the mixed graph in order of execution."""
        nodes: list[onnx.NodeProto] = []
        halves: set[str] = set()
        for original in self._nodes:
            node = copy.deepcopy(original)
            if node.name in islands:
                for name in node.input:
                    if name in halves:
                        self._cast(nodes, name + SUFFIX, name, TensorProto.FLOAT)
                nodes.append(node)
                continue
            for index, name in enumerate(node.input):
                if index not in FLOAT32_INPUTS.get(node.op_type, ()):
                    node.input[index] = self._half(nodes, name)
            for index, name in enumerate(node.output):
                if name in self._floats:
                    node.output[index] = name + SUFFIX
                    halves.add(name)
                    self._made.add(name + SUFFIX)
            nodes.append(node)
            for name in self._outputs.intersection(original.output) & halves:
                self._cast(nodes, name + SUFFIX, name, TensorProto.FLOAT)
        return nodes

    def _half(self, nodes: list[onnx.NodeProto], name: str) -> str:
        """Name of the float16 twin of a tensor, which is made if it is not there; other types are left alone."""
        twin = name + SUFFIX
        tensor = self._initializers.get(name)
        if tensor is not None and tensor.data_type == TensorProto.FLOAT:
            if twin not in self._made:
                self._made.add(twin)
                self.weights.append(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), twin))
            return twin
        if tensor is not None or name not in self._floats:
            return name
        self._cast(nodes, name, twin, TensorProto.FLOAT16)
        return twin

    def _cast(self, nodes: list[onnx.NodeProto], source: str, target: str, to: int) -> None:
        if target not in self._made:
            self._made.add(target)
            nodes.append(helper.make_node("Cast", [source], [target], name=f"{target}_cast", to=to))


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def float32_nodes(graph: onnx.ModelProto, name: str) -> set[str]:
    """Names of the nodes that stay float32: the islands.

    Args:
        graph: Engine as exported.
        name: Which of the three engines it is.
    """
    islands = set()
    for node in graph.graph.node:
        # Nodes right under the head handle points, poses, ages and the memory; layers are modules below it.
        path = [re.sub(r"_\d+$", "", part) for part in module_path(node.name)]
        geometry = name == "head" and len(path) < 2
        if geometry or node.op_type in ISLAND_OPS or ISLAND_MODULES.intersection(path):
            islands.add(node.name)
    return islands


def _check_range(graph: onnx.ModelProto, islands: Iterable[str], name: str) -> None:
    weights = {tensor.name: tensor for tensor in graph.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    for node in graph.graph.node:
        if node.name in islands:
            continue
        for key in node.input:
            if key in weights and abs(numpy_helper.to_array(weights[key])).max(initial=0.0) > FLOAT16_MAX:
                raise DeploymentError(
                    f"{name}: weight {key} of node {node.name!r} exceeds float16's largest value {FLOAT16_MAX:g}; "
                    "export with --precision float32"
                )
