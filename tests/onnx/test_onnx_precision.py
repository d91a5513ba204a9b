from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, shape_inference

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.onnx.precision import to_float16
from mdp_mmdet3d.onnx.quantise import check_symmetric
from mdp_mmdet3d.onnx.reduce import reduce_precision
from mdp_mmdet3d.runtime.accuracy import compare_boxes, match_boxes
from mdp_mmdet3d.runtime.decode import Detections
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.runtime.stream import StreamRunner

from ..tiny_deployment import make_frames


@pytest.fixture(scope="module")
def reduced(tiny_deployment, tmp_path_factory):
    base = tmp_path_factory.mktemp("reduced")
    frames = make_frames(6, 3)
    return {p: (base / p, reduce_precision(tiny_deployment, base / p, p, frames)) for p in ("float16", "int8")}


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_boxes_survive_and_the_agreement_is_written_down(reduced, tiny_deployment, precision):
    folder, manifest = reduced[precision]
    assert DeploymentManifest.load(folder) == manifest
    assert manifest.precision == precision
    found = manifest.checks["boxes_against_float32"]
    assert found["boxes"] > 100 and found["matched_share"] > 0.9
    assert 0 < found["max_logit_difference"] < 0.1
    again = compare_boxes(StreamRunner(tiny_deployment), StreamRunner(folder), make_frames(6, 3))
    assert again.to_json() == found


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_host_interface_and_position_embedding_stay_float32(reduced, tiny_deployment, precision):
    manifest = reduced[precision][1]
    dense = DeploymentManifest.load(tiny_deployment)
    assert manifest.engines == dense.engines
    assert manifest.checksums["position_embedding.onnx"] == dense.checksums["position_embedding.onnx"]
    assert manifest.checksums["head.onnx"] != dense.checksums["head.onnx"]


def test_layers_are_float16_and_islands_float32(reduced):
    graph = shape_inference.infer_shapes(
        onnx.load(reduced["float16"][0] / "head.onnx"), strict_mode=True, data_prop=True
    )
    types = {v.name: v.type.tensor_type.elem_type for v in [*graph.graph.value_info, *graph.graph.output]}
    by_op = {}
    for node in graph.graph.node:
        by_op.setdefault(node.op_type, []).append(types[node.output[0]])
    for op in ("Softmax", "Sigmoid", "LayerNormalization", "Sin", "Cos", "Log"):
        assert set(by_op[op]) == {TensorProto.FLOAT}, op
    assert by_op["Gemm"].count(TensorProto.FLOAT16) > 0.8 * len(by_op["Gemm"])
    boxes = [n for n in graph.graph.node if "reg_branches" in n.name and n.op_type == "Gemm"]
    assert boxes and {types[n.output[0]] for n in boxes} == {TensorProto.FLOAT}


def test_poses_never_pass_through_float16(reduced):
    """No path from a pose input to a graph node goes through a cast before the pose product."""
    graph = onnx.load(reduced["float16"][0] / "head.onnx").graph
    poses = {"data_ego_pose", "data_ego_pose_inv", "pre_memory_egopose", "pre_memory_reference_point"}
    readers = [node for node in graph.node if poses.intersection(node.input)]
    assert readers and not [node.name for node in readers if node.op_type == "Cast"]


def test_float16_halves_the_weights(reduced, tiny_deployment):
    size = {f: (f / "image_encoder.onnx").stat().st_size for f in (tiny_deployment, reduced["float16"][0])}
    assert size[reduced["float16"][0]] < 0.6 * size[tiny_deployment]


def test_convolutions_of_the_encoder_are_quantised_per_channel(reduced):
    graph = onnx.load(reduced["int8"][0] / "image_encoder.onnx")
    check_symmetric(graph)
    producers = {output: node for node in graph.graph.node for output in node.output}
    constants = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    for node in convolutions:
        weight = producers[node.input[1]]
        assert weight.op_type == "DequantizeLinear" and producers[node.input[0]].op_type == "DequantizeLinear"
        channels = constants[weight.input[0]].shape[0]
        assert constants[weight.input[0]].dtype == np.int8 and constants[weight.input[1]].shape == (channels,)


def test_a_zero_point_is_refused(reduced):
    graph = onnx.load(reduced["int8"][0] / "image_encoder.onnx")
    node = next(n for n in graph.graph.node if n.op_type == "QuantizeLinear")
    zero = next(t for t in graph.graph.initializer if t.name == node.input[2])
    zero.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), zero.name))
    with pytest.raises(DeploymentError, match="zero point"):
        check_symmetric(graph)


def test_a_weight_beyond_float16_is_refused(tiny_deployment):
    graph = onnx.load(tiny_deployment / "image_encoder.onnx")
    weight = next(t for t in graph.graph.initializer if len(t.dims) == 4)
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = 1e6
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    with pytest.raises(DeploymentError, match="65504"):
        to_float16(graph, "image_encoder")


def test_only_float32_is_reduced(reduced, tiny_deployment, tmp_path):
    with pytest.raises(DeploymentError, match="float16"):
        reduce_precision(reduced["float16"][0], tmp_path / "again", "int8", make_frames(1))
    with pytest.raises(DeploymentError, match="0 frames"):
        reduce_precision(tiny_deployment, tmp_path / "none", "int8", [])
    assert list(tmp_path.iterdir()) == []


def test_a_broken_source_leaves_nothing(tiny_deployment, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_deployment, source)
    (source / "head.onnx").write_bytes((source / "head.onnx").read_bytes()[:-100])
    with pytest.raises(Exception, match="truncated or replaced"):
        reduce_precision(source, tmp_path / "out", "float16", make_frames(1))
    assert not (tmp_path / "out").exists()


def test_boxes_are_matched_one_to_one_by_class_and_distance():
    def boxes(points, labels, scores):
        array = np.zeros((len(points), 9))
        array[:, :2] = points
        return Detections(array, np.array(scores), np.array(labels))

    expected = boxes([[0, 0], [0.3, 0], [10, 0], [20, 0]], [0, 0, 1, 2], [0.9, 0.8, 0.7, 0.6])
    found = boxes([[0.1, 0], [10, 0], [20.0, 0.6]], [0, 2, 2], [0.5, 0.5, 0.5])
    distances, scores = match_boxes(expected, found)
    np.testing.assert_allclose(distances, [0.1])
    np.testing.assert_allclose(scores, [0.4])
