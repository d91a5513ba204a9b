from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper, shape_inference
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.onnx.export import export_onnx
from mdp_mmdet3d.onnx.quantise import calibrate, check_replaces, to_int8
from mdp_mmdet3d.onnx.reduce import reduce_precision

from ..tiny_deployment import make_frames


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inputs, width, 3, stride, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.downsample = nn.Conv2d(inputs, width, 1, stride) if stride > 1 or inputs != width else None

    def forward(self, x):
        rest = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + rest)


class Backbone(nn.Module):
    """What an image encoder is made of: stem, pooling, residual blocks with and without downsampling, a pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, 2, 3)
        self.block1, self.block2, self.block3 = Block(8, 8, 1), Block(8, 16, 2), Block(16, 16, 1)
        self.lateral1, self.lateral2 = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)
        self.out = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, img):
        x = torch.max_pool2d(torch.relu(self.stem(img.flatten(0, 1))), 2)
        fine = self.block1(x)
        coarse = self.block3(self.block2(fine))
        fine = self.lateral1(fine) + nn.functional.interpolate(self.lateral2(coarse), scale_factor=2)
        return self.out(fine)[None]


def image(seed):
    return np.random.default_rng(seed).standard_normal((1, 2, 3, 32, 48)).astype(np.float32)


FEEDS = [{"img": image(seed)} for seed in range(3)]


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("quantise") / "image_encoder.onnx"
    return export_onnx(Backbone().eval(), {"img": torch.from_numpy(image(0))}, ["img_feats"], path)


@pytest.fixture(scope="module")
def int8(graph):
    return to_int8(graph, FEEDS)


def run(model, feed):
    return ort.InferenceSession(model.SerializeToString()).run(None, feed)[0]


def users(model):
    found = {}
    for node in model.graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def test_nothing_stands_between_a_convolution_and_its_relu_or_sum(int8):
    read_by = users(int8)
    producers = {name: node for node in int8.graph.node for name in node.output}
    behind = {node.name: [user.op_type for user in read_by[node.output[0]]] for node in int8.graph.node
              if node.op_type == "Conv"}  # fmt: skip
    residual = {"/block2/downsample/Conv": ["QuantizeLinear"], "/lateral2/Conv": ["Resize"], "/out/Conv": ["Unsqueeze"]}
    for name, found in behind.items():
        assert found == residual.get(name, ["Add" if "conv2" in name or "lateral1" in name else "Relu"]), name
    sums = [node for node in int8.graph.node if node.op_type == "Add"]
    assert len(sums) == 4
    for node in sums:
        assert {producers[name].op_type for name in node.input} == {"Conv", "DequantizeLinear"}
    # What is quantised is not read in float16 too: it would be kept twice.
    for node in int8.graph.node:
        if node.op_type == "QuantizeLinear":
            assert read_by[node.input[0]] == [node]


def test_weights_are_int8_per_channel(int8):
    constants = {t.name: numpy_helper.to_array(t) for t in int8.graph.initializer}
    producers = {name: node for node in int8.graph.node for name in node.output}
    for node in int8.graph.node:
        if node.op_type == "Conv":
            values, scale = (constants[name] for name in producers[node.input[1]].input[:2])
            assert values.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (len(values),)
            assert producers[node.input[0]].op_type == "DequantizeLinear"
    assert not [t.name for t in int8.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 4]


def test_int8_computes_nearly_the_same(graph, int8):
    for seed in (0, 7):
        expected, found = run(graph, {"img": image(seed)}), run(int8, {"img": image(seed)})
        error = np.abs(found - expected).mean() / np.abs(expected).mean()
        assert 1e-4 < error < 0.05


def test_a_range_is_the_largest_magnitude_averaged_over_frames(graph):
    tensor = next(node.input[0] for node in graph.graph.node if node.op_type == "Conv")
    expected = np.mean([np.abs(feed["img"]).max() for feed in FEEDS])
    assert calibrate(graph, [tensor], FEEDS) == {tensor: pytest.approx(expected, rel=1e-6)}


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e-4])
def test_a_channel_of_small_weights_keeps_its_bias(graph, value):
    """Runtimes round a bias to steps of input scale times weight scale: of vanishing weights, to too many steps."""
    small = onnx.ModelProto()
    small.CopyFrom(graph)
    node = next(node for node in small.graph.node if node.name == "/block3/conv1/Conv")
    for name, change in zip(node.input[1:3], (value, 0.7)):
        tensor = next(t for t in small.graph.initializer if t.name == name)
        values = numpy_helper.to_array(tensor).copy()
        values[3] = change
        tensor.CopyFrom(numpy_helper.from_array(values, name))
    expected, found = run(small, FEEDS[0]), run(to_int8(small, FEEDS), FEEDS[0])
    assert np.abs(found - expected).mean() < 0.05 * np.abs(expected).mean()


def test_excluded_convolutions_read_and_keep_float16(graph):
    mixed = to_int8(graph, FEEDS, exclude=["/block2/*", "/out/Conv"])
    producers = {name: node for node in mixed.graph.node for name in node.output}
    for node in mixed.graph.node:
        if node.op_type == "Conv":
            excluded = node.name.startswith("/block2") or node.name == "/out/Conv"
            assert (node.input[1] not in producers) == excluded, node.name
            assert (producers[node.input[0]].op_type != "DequantizeLinear") == excluded, node.name
    inferred = shape_inference.infer_shapes(mixed, strict_mode=True, data_prop=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*inferred.value_info, *inferred.input, *inferred.output]}
    assert {types[v.name] for v in [*mixed.graph.input, *mixed.graph.output]} == {TensorProto.FLOAT}
    found = {node.name: types[node.output[0]] for node in mixed.graph.node}
    for name in ("/block2/conv1/Conv", "/block2/Relu", "/out/Conv"):
        assert found[name] == TensorProto.FLOAT16, name
    read_by = users(mixed)
    for node in mixed.graph.node:
        if found[node.name] == TensorProto.FLOAT and node.op_type == "Conv":
            assert [user.op_type for user in read_by[node.output[0]]] != ["Cast"], node.name
    expected = run(graph, FEEDS[0])
    assert np.abs(run(mixed, FEEDS[0]) - expected).mean() < 0.05 * np.abs(expected).mean()


@pytest.mark.parametrize(
    ("feeds", "exclude", "message"),
    [
        (FEEDS[:1], (), "at least 2 calibration frames, got 1"),
        (FEEDS, ("*/conv9/*",), r"'\*/conv9/\*' matches no convolution; their names look like /stem/Conv"),
        (FEEDS, ("*",), "all 11 convolutions"),
        ([FEEDS[0], {"img": np.full_like(FEEDS[0]["img"], np.nan)}], (), "not finite"),
    ],
)
def test_bad_input_is_named(graph, feeds, exclude, message):
    with pytest.raises(DeploymentError, match=message):
        to_int8(graph, feeds, exclude)


class Feeds(CalibrationDataReader):
    def __init__(self, feeds):
        self.feeds = iter(feeds)

    def get_next(self):
        return next(self.feeds, None)


@pytest.fixture
def foreign(tiny_deployment, tmp_path):
    """Q/DQ of another tool: ONNX Runtime's quantiser."""
    path = tmp_path / "foreign.onnx"
    options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    quantize_static(onnx.load(str(tiny_deployment / "image_encoder.onnx")), str(path),
                    Feeds([{"img": frame.img[None]} for frame in make_frames(2)]), quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=["Conv"], per_channel=True, activation_type=QuantType.QInt8,
                    weight_type=QuantType.QInt8, extra_options=options)  # fmt: skip
    return path


def test_a_graph_of_another_tool_is_taken_as_it_is(tiny_deployment, foreign, graph, tmp_path):
    frames = make_frames(2)
    manifest = reduce_precision(tiny_deployment, tmp_path / "out", "int8", frames, quantised=foreign)
    assert onnx.load(str(tmp_path / "out/image_encoder.onnx")) == onnx.load(str(foreign))
    assert manifest.precision == "int8" and manifest.checks["boxes_against_float32"]["matched_share"] > 0.9
    original = onnx.load(str(tiny_deployment / "image_encoder.onnx"))
    with pytest.raises(DeploymentError, match="inputs img FLOAT"):
        check_replaces(to_int8(graph, FEEDS), original)
    with pytest.raises(DeploymentError, match="nothing in it is quantised"):
        check_replaces(original, original)
    for options, message in (
        ({"precision": "float16", "quantised": foreign}, "for int8"),
        ({"precision": "int8", "quantised": foreign, "exclude": ["*"]}, "as it is"),
        ({"precision": "int8", "quantised": tmp_path / "none.onnx"}, "none.onnx"),
        ({"precision": "int8", "calibration": [frames[0].img]}, "got 1"),
    ):
        with pytest.raises(DeploymentError, match=message):
            reduce_precision(tiny_deployment, tmp_path / "bad", frames=frames, **options)
    assert not (tmp_path / "bad").exists()
