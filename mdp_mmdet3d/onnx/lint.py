"""Refuse ONNX graphs that a vehicle's runtime would change silently, run slowly or not run at all.

The rules allow what TensorRT and ONNX Runtime both run with static shapes, without plugins and float64, which
TensorRT turns into float32 without a word (an epoch timestamp then has a resolution of 128 s).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import onnx
from onnx import numpy_helper, shape_inference

from mdp_mmdet3d.errors import DeploymentError

TOPK_LIMIT = 3840
"""Largest K of TensorRT's TopK layer."""

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})


class LintRule(str, Enum):
    """What is refused."""

    FLOAT64 = "float64"
    DATA_DEPENDENT_SHAPE = "data-dependent-shape"
    MATRIX_INVERSE = "matrix-inverse"
    NMS = "nms"
    CUSTOM_OP = "custom-op"
    CONTROL_FLOW = "control-flow"
    DYNAMIC_DIM = "dynamic-dim"
    DEAD_INPUT = "dead-input"
    TOPK = "topk"


_REFUSED_OPS = {
    **dict.fromkeys(["NonZero", "Compress", "Unique", "StringNormalizer"], LintRule.DATA_DEPENDENT_SHAPE),
    **dict.fromkeys(["Inverse", "MatrixInverse", "Inv"], LintRule.MATRIX_INVERSE),
    **dict.fromkeys(["NonMaxSuppression", "EfficientNMS_TRT", "BatchedNMS_TRT"], LintRule.NMS),
    **dict.fromkeys(["If", "Loop", "Scan"], LintRule.CONTROL_FLOW),
}
_REMEDY = {
    LintRule.FLOAT64: "compute in float32, or on the host",
    LintRule.DATA_DEPENDENT_SHAPE: "use TopK with a fixed K, or Where",
    LintRule.MATRIX_INVERSE: "feed the inverse, or the closed form of a rigid transform",
    LintRule.NMS: "run it on the host",
    LintRule.CUSTOM_OP: "express it in standard operators",
    LintRule.CONTROL_FLOW: "unroll it when exporting",
    LintRule.DYNAMIC_DIM: "export with static shapes",
    LintRule.DEAD_INPUT: "remove it from the graph's inputs",
    LintRule.TOPK: f"use a constant K <= {TOPK_LIMIT}",
}


@dataclass(frozen=True)
class LintFinding:
    """One violation.

    Attributes:
        rule: The rule that is broken.
        node: Name of the node, or of the tensor where no node is to blame.
        detail: What was found there.
    """

    rule: LintRule
    node: str
    detail: str

    def __str__(self) -> str:
        return f"{self.rule.value} at {self.node!r}: {self.detail} ({_REMEDY[self.rule]})"


def lint_onnx(model: str | Path | onnx.ModelProto) -> list[LintFinding]:
    """Find everything in a graph that deployment forbids.

    Args:
        model: ONNX file or model, at most 2 GB.

    Returns:
        Findings, at most one per rule and node; empty if the graph may be deployed.

    Raises:
        DeploymentError: The file cannot be read as ONNX, or shape inference contradicts the graph.
    """
    proto = load_onnx(model)
    findings = [LintFinding(LintRule.CUSTOM_OP, function.name, "model-local function") for function in proto.functions]
    for graph in _graphs(proto.graph):
        constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            findings += _lint_node(node, constants)
    findings += _lint_values(proto)
    findings += _dead_inputs(proto.graph)
    return list({(finding.rule, finding.node): finding for finding in findings}.values())


def require_clean(model: str | Path | onnx.ModelProto, what: str) -> None:
    """Raise `DeploymentError` listing every finding in ``model``, called ``what`` in the message."""
    findings = lint_onnx(model)
    if findings:
        lines = "\n".join(f"  {finding}" for finding in findings)
        raise DeploymentError(f"{what} cannot be deployed, {len(findings)} finding(s):\n{lines}")


def load_onnx(model: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    """Read an ONNX file, or return a model unchanged; `DeploymentError` if it is unreadable."""
    if isinstance(model, onnx.ModelProto):
        return model
    try:
        proto = onnx.load(str(model))
    except Exception as error:  # protobuf raises implementation-specific types
        raise DeploymentError(f"{model} is not a readable ONNX file ({error}); export again") from error
    if not proto.graph.node:
        raise DeploymentError(f"{model} holds no graph: truncated or not ONNX; export again")
    return proto


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _lint_node(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> list[LintFinding]:
    findings = []
    name = node.name or f"{node.op_type} -> {node.output[0] if node.output else '?'}"
    if node.op_type in _REFUSED_OPS:
        findings.append(LintFinding(_REFUSED_OPS[node.op_type], name, f"operator {node.op_type}"))
    elif node.domain not in STANDARD_DOMAINS:
        findings.append(LintFinding(LintRule.CUSTOM_OP, name, f"operator {node.domain}::{node.op_type}"))
    for attribute in node.attribute:
        is_cast = node.op_type == "Cast" and attribute.name == "to"
        if (is_cast and attribute.i == onnx.TensorProto.DOUBLE) or attribute.t.data_type == onnx.TensorProto.DOUBLE:
            findings.append(LintFinding(LintRule.FLOAT64, name, f"attribute {attribute.name!r} of {node.op_type}"))
    if node.op_type == "TopK":
        k = constants.get(node.input[1])
        if k is None:
            findings.append(LintFinding(LintRule.TOPK, name, "K is computed"))
        elif (value := int(numpy_helper.to_array(k).item())) > TOPK_LIMIT:
            findings.append(LintFinding(LintRule.TOPK, name, f"K is {value}"))
    return findings


def _lint_values(proto: onnx.ModelProto) -> list[LintFinding]:
    """Types and shapes of initializers, inputs, outputs and everything between them."""
    findings = [
        LintFinding(LintRule.FLOAT64, tensor.name, "initializer")
        for tensor in proto.graph.initializer
        if tensor.data_type == onnx.TensorProto.DOUBLE
    ]
    findings += [
        LintFinding(LintRule.DYNAMIC_DIM, value.name, f"graph input or output of shape {_shape_text(value)}")
        for value in [*proto.graph.input, *proto.graph.output]
        if not _is_static(value)
    ]
    try:
        inferred = shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    except shape_inference.InferenceError as error:
        if findings or any(node.domain not in STANDARD_DOMAINS for node in proto.graph.node):
            return findings
        raise DeploymentError(f"shape inference refuses the graph: {error}") from error
    producers = {output: node.name or node.op_type for node in inferred.node for output in node.output}
    values = {value.name: value for value in [*inferred.value_info, *inferred.input, *inferred.output]}
    for name, value in values.items():
        if value.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE:
            findings.append(LintFinding(LintRule.FLOAT64, producers.get(name, name), f"tensor {name!r}"))
    for node in inferred.node:
        for output in filter(None, node.output):
            if output not in values or not _is_static(values[output]):
                text = _shape_text(values[output]) if output in values else "unknown"
                findings.append(
                    LintFinding(LintRule.DYNAMIC_DIM, producers[output], f"tensor {output!r} of shape {text}")
                )
    return findings


def _is_static(value: onnx.ValueInfoProto) -> bool:
    tensor = value.type.tensor_type
    return tensor.HasField("shape") and all(dim.HasField("dim_value") and dim.dim_value > 0 for dim in tensor.shape.dim)


def _shape_text(value: onnx.ValueInfoProto) -> str:
    dims = value.type.tensor_type.shape.dim
    return "(" + ", ".join(dim.dim_param or str(dim.dim_value or "?") for dim in dims) + ")"


def _dead_inputs(graph: onnx.GraphProto) -> list[LintFinding]:
    """Inputs that no output depends on."""
    needed = {output.name for output in graph.output}
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            needed.update(name for inner in _graphs_of(node) for child in inner.node for name in child.input)
    constants = {tensor.name for tensor in graph.initializer}
    return [
        LintFinding(LintRule.DEAD_INPUT, value.name, "no output depends on this input")
        for value in graph.input
        if value.name not in needed and value.name not in constants
    ]


def _graphs_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield from _graphs(attribute.g)
