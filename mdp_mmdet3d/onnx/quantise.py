"""int8 for the image encoder: Q/DQ pairs that every TensorRT and ONNX Runtime read alike."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from mdp_mmdet3d.errors import DeploymentError


class _Feeds(CalibrationDataReader):
    """The calibration frames, once."""

    def __init__(self, feeds: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        """Next frame, None at the end."""
        return next(self._feeds, None)


def to_int8(graph: onnx.ModelProto, feeds: Sequence[Mapping[str, np.ndarray]]) -> onnx.ModelProto:
    """Quantise the convolutions of an engine: symmetric, weights per output channel, activations per tensor.

    The ranges of activations are the extremes seen in ``feeds``, smoothed over frames. Biases stay float32, as
    TensorRT wants them.

    Args:
        graph: float32 engine with static shapes.
        feeds: Calibration inputs by name, at least one.

    Returns:
        The graph with Q/DQ around its convolutions, float32 inputs and outputs.

    Raises:
        DeploymentError: There is no frame, or no convolution was quantised.
    """
    if not feeds:
        raise DeploymentError("int8 needs at least one calibration frame")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "int8.onnx"
        quantize_static(
            graph,
            str(target),
            _Feeds(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "CalibMovingAverage": len(feeds) > 1,
            },
        )
        quantised = onnx.load(str(target))
    check_symmetric(quantised)
    return quantised


def check_symmetric(graph: onnx.ModelProto) -> None:
    """Raise `DeploymentError` unless the graph has Q/DQ nodes and every zero point is 0, which TensorRT demands."""
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}
    nodes = [node for node in graph.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    if not nodes:
        raise DeploymentError("nothing was quantised: the graph has no convolution")
    for node in nodes:
        if len(node.input) > 2 and numpy_helper.to_array(constants[node.input[2]]).any():
            raise DeploymentError(f"{node.op_type} {node.name!r} has a zero point other than 0")
