"""int8 for the image encoder: Q/DQ pairs where TensorRT fuses them.

A convolution of TensorRT takes its bias, a residual and a ReLU in, if nothing stands between them: so a pair stands in
front of each convolution, behind the ReLU that precedes it, and on the residual of the sum that a convolution ends in;
never between a convolution and its ReLU or sum. What reads a quantised tensor reads it quantised, or it would be kept
twice (NVIDIA's "Custom Q/DQ insertion case" for ResNets; TensorRT's "Working with quantized types").

Scales are float32, and so by name is what a convolution hands to its ReLU and sum, which one kernel never stores. With
float16 scales ONNX Runtime 1.31 rounds biases to steps of a product of two scales that float16 cannot hold, and
features are off by a fifth (its WeightBiasQuantization). Layers that are left out, and what they touch, are float16.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper, shape_inference

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.onnx.precision import to_float16

LARGEST = 127
BIAS_STEPS = 2.0**24
"""Runtimes add a bias in steps of input scale times weight scale, as int32: more steps could overflow."""

TINY = float(np.finfo(np.float32).tiny)
MIN_FRAMES = 2
Q, DQ = "QuantizeLinear", "DequantizeLinear"


def to_int8(
    graph: onnx.ModelProto, feeds: Sequence[Mapping[str, np.ndarray]], exclude: Sequence[str] = ()
) -> onnx.ModelProto:
    """Quantise the convolutions of an engine: symmetric, weights per output channel, activations per tensor.

    The range of an activation is its largest magnitude in a frame, averaged over ``feeds``.

    Args:
        graph: float32 engine with static shapes and named nodes.
        feeds: Calibration inputs by name; a few dozen, spread over the data set.
        exclude: Patterns (``*``, ``?``) of names of convolutions that become float16, e.g. ``"*/conv1/Conv"``.

    Returns:
        The graph with Q/DQ around its convolutions, with float32 inputs and outputs.

    Raises:
        DeploymentError: There are too few frames, a pattern matches nothing, nothing is left to quantise, a range is
            not finite, or a weight does not fit into float16.
    """
    if len(feeds) < MIN_FRAMES:
        raise DeploymentError(
            f"int8 needs at least {MIN_FRAMES} calibration frames, got {len(feeds)}: the ranges of one frame are those "
            "of its scene; a few dozen spread over the data set are usual"
        )
    chosen = _chosen(graph.graph, exclude)
    points = _points(graph.graph, chosen)
    ranges = calibrate(graph, points, feeds)
    quantised = _insert(copy.deepcopy(graph), chosen, ranges)
    try:
        onnx.checker.check_model(quantised, full_check=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
        raise DeploymentError(f"the graph in int8 is not valid: {error}") from error
    check_symmetric(quantised)
    if exclude:
        quantised = to_float16(quantised, "image_encoder", _touches_int8(quantised.graph, chosen))
    return quantised


def calibrate(
    graph: onnx.ModelProto, tensors: Sequence[str], feeds: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, float]:
    """Largest magnitude of each tensor in a frame, averaged over frames.

    Raises:
        DeploymentError: One is not finite.
    """
    probe = copy.deepcopy(graph)
    del probe.graph.output[:]
    names = {}
    for index, tensor in enumerate(tensors):
        names[tensor] = f"range_{index}"
        probe.graph.node.extend(
            [
                helper.make_node("Abs", [tensor], [f"magnitude_{index}"]),
                helper.make_node("ReduceMax", [f"magnitude_{index}"], [names[tensor]], keepdims=0),
            ]
        )
        probe.graph.output.append(helper.make_tensor_value_info(names[tensor], TensorProto.FLOAT, []))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    total = np.mean([session.run(list(names.values()), dict(feed)) for feed in feeds], axis=0, dtype=np.float64)
    if bad := [name for name, value in zip(names, total) if not np.isfinite(value)]:
        raise DeploymentError(f"the range of {bad[0]!r} is not finite; look at the calibration frames and the weights")
    return dict(zip(names, total.tolist()))


def check_symmetric(graph: onnx.ModelProto) -> None:
    """Raise `DeploymentError` unless the graph has Q/DQ nodes and every zero point is 0, which TensorRT demands."""
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                constants[node.output[0]] = attribute.t
    nodes = [node for node in graph.graph.node if node.op_type in (Q, DQ)]
    if not nodes:
        raise DeploymentError("the graph has no QuantizeLinear and no DequantizeLinear: nothing in it is quantised")
    for node in nodes:
        zero_point = constants.get(node.input[2]) if len(node.input) > 2 else None
        if zero_point is not None and numpy_helper.to_array(zero_point).any():
            raise DeploymentError(f"{node.op_type} {node.name!r} has a zero point other than 0")


def check_replaces(quantised: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """Raise `DeploymentError` unless a Q/DQ graph of another tool, e.g. Model-Optimizer, can stand for an engine.

    It must have the same inputs and outputs, float32, and symmetric Q/DQ nodes.
    """
    for what in ("input", "output"):
        found, expected = (
            {
                value.name: (
                    value.type.tensor_type.elem_type,
                    tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim),
                )
                for value in getattr(graph.graph, what)
            }
            for graph in (quantised, original)
        )
        if found != expected:
            raise DeploymentError(
                f"the quantised graph has the {what}s {_signature(found)}, the engine that it stands for "
                f"{_signature(expected)}: quantise this image_encoder.onnx, with float32 inputs and outputs"
            )
    check_symmetric(quantised)


def _signature(values: Mapping[str, tuple[int, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {TensorProto.DataType.Name(kind)}{list(dims)}" for name, (kind, dims) in values.items())


def _chosen(graph: onnx.GraphProto, exclude: Sequence[str]) -> dict[str, onnx.NodeProto]:
    """Convolutions to quantise, by name."""
    constants = {tensor.name for tensor in graph.initializer}
    found = {node.name: node for node in graph.node if node.op_type == "Conv" and node.input[1] in constants}
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in found):
            examples = ", ".join(list(found)[:3])
            raise DeploymentError(f"{pattern!r} matches no convolution; their names look like {examples}")
    left = {name: node for name, node in found.items() if not any(fnmatchcase(name, item) for item in exclude)}
    if not left:
        raise DeploymentError(f"nothing to quantise: all {len(found)} convolutions with constant weights are excluded")
    return left


def _points(graph: onnx.GraphProto, chosen: Mapping[str, onnx.NodeProto]) -> list[str]:
    """Tensors to quantise: inputs of the convolutions, and residuals of sums that end one."""
    producers = {name: (index, node) for index, node in enumerate(graph.node) for name in node.output}
    uses: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    points = dict.fromkeys(node.input[0] for node in chosen.values())
    for node in graph.node:
        if node.op_type != "Add":
            continue
        # TensorRT takes the sum into the convolution that runs last.
        ends = [
            (producers[name][0], name)
            for name in node.input
            if name in producers and producers[name][1].name in chosen and uses[name] == 1
        ]
        rest = [name for name in node.input if ends and name != max(ends)[1] and name in producers]
        points |= dict.fromkeys(rest)
    return list(points)


def _insert(
    model: onnx.ModelProto, chosen: Mapping[str, onnx.NodeProto], ranges: Mapping[str, float]
) -> onnx.ModelProto:
    """Q/DQ behind every tensor that has a range, and int8 weights; changes ``model``."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    old = list(graph.node)
    del graph.node[:]
    zero = "zero_point"
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.int8), zero))
    read_as: dict[str, str] = {}

    def quantise(tensor: str) -> None:
        names = {key: f"{tensor}.{key}" for key in ("scale", "int8", "dequantised")}
        graph.initializer.append(numpy_helper.from_array(_scale(ranges[tensor]), names["scale"]))
        nodes = (
            helper.make_node(Q, [tensor, names["scale"], zero], [names["int8"]], name=f"{tensor}.Q"),
            helper.make_node(DQ, [names["int8"], names["scale"], zero], [names["dequantised"]], name=f"{tensor}.DQ"),
        )
        graph.node.extend(nodes)
        read_as[tensor] = names["dequantised"]

    for value in graph.input:
        if value.name in ranges:
            quantise(value.name)
    for node in old:
        tensors = list(node.input)
        if node.op_type != "Conv" or node.name in chosen:
            node.input[:] = [read_as.get(name, name) for name in tensors]
        if node.name in chosen:
            weight, *bias = (numpy_helper.to_array(constants[name]) for name in tensors[1:])
            parts = _quantised_weight(weight, bias[0] if bias else np.zeros(len(weight)), ranges[tensors[0]])
            names = [f"{node.name}.weight.{key}" for key in parts]
            graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in zip(names, parts.values()))
            node.input[1] = f"{node.name}.weight.dequantised"
            graph.node.append(helper.make_node(DQ, names, [node.input[1]], name=f"{node.name}.weight.DQ", axis=0))
        graph.node.append(node)
        for output in node.output:
            if output in ranges:
                quantise(output)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]
    return model


def _scale(largest: float) -> np.ndarray:
    return np.array(max(largest / LARGEST, TINY), np.float32)


def _quantised_weight(weight: np.ndarray, bias: np.ndarray, input_range: float) -> dict[str, np.ndarray]:
    """int8 weight, float32 scale and zero point per output channel."""
    scale = np.abs(weight).reshape(len(weight), -1).max(axis=1) / LARGEST
    # A channel of vanishing weights needs no finer steps than its bias.
    scale = np.maximum(scale, np.abs(bias) / (_scale(input_range) * BIAS_STEPS))
    scale = np.maximum(scale, TINY).astype(np.float32)
    values = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1)))
    return {
        "int8": np.clip(values, -LARGEST, LARGEST).astype(np.int8),
        "scale": scale,
        "zero_point": np.zeros(len(scale), np.int8),
    }


def _touches_int8(graph: onnx.GraphProto, chosen: Mapping[str, onnx.NodeProto]) -> set[str]:
    """Q/DQ, quantised convolutions, and what they hand on: a cast between them would break their kernel up."""
    islands: set[str] = set()
    outputs: set[str] = set()
    for node in graph.node:
        own = node.op_type in (Q, DQ) or node.name in chosen
        if own or (node.op_type != "Conv" and not outputs.isdisjoint(node.input)):
            islands.add(node.name)
            outputs.update(node.output)
    return islands
