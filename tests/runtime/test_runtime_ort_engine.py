from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime.ort_engine import OrtEngine


@pytest.fixture
def engine_path(tmp_path):
    """y = a @ w, s = a + b."""
    nodes = [helper.make_node("MatMul", ["a", "w"], ["y"]), helper.make_node("Add", ["a", "b"], ["s"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in ("a", "b")],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4]),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, [2, 3]),
        ],
        [numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(3, 4), "w")],
    )
    path = tmp_path / "engine.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def feeds(value=1.0):
    return {name: np.full((2, 3), value, np.float32) for name in ("a", "b")}


def test_signature_and_results(engine_path):
    engine = OrtEngine(engine_path)
    assert {name: spec.shape for name, spec in engine.outputs.items()} == {"y": (2, 4), "s": (2, 3)}
    outputs = engine.run(feeds())
    np.testing.assert_array_equal(outputs["y"], np.full((2, 4), [12, 15, 18, 21]))


def test_outputs_of_an_earlier_run_are_not_overwritten(engine_path):
    engine = OrtEngine(engine_path)
    first = engine.run(feeds(1.0))["s"]
    engine.run(feeds(5.0))
    np.testing.assert_array_equal(first, np.full((2, 3), 2.0))


def test_non_contiguous_inputs_give_the_same_result(engine_path):
    engine = OrtEngine(engine_path)
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    view = base[:, ::2].T
    assert not view.flags.c_contiguous
    np.testing.assert_array_equal(
        engine.run({"a": view, "b": view})["y"], engine.run({"a": view.copy(), "b": view.copy()})["y"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": None}, r"missing inputs \['a'\]"),
        ({"c": np.zeros(1, np.float32)}, r"unknown inputs \['c'\]"),
        ({"a": np.zeros((2, 4), np.float32)}, r"'a' is float32\[2, 4\].*float32\[2, 3\]"),
        ({"b": np.zeros((2, 3))}, r"'b' is float64"),
    ],
)
def test_wrong_inputs_are_refused(engine_path, change, message):
    given = {name: value for name, value in {**feeds(), **change}.items() if value is not None}
    with pytest.raises(DeploymentError, match=message):
        OrtEngine(engine_path).run(given)


def test_missing_and_truncated_files_are_refused(engine_path):
    with pytest.raises(DeploymentError, match="does not exist"):
        OrtEngine(engine_path.with_name("none.onnx"))
    engine_path.write_bytes(engine_path.read_bytes()[:-20])
    with pytest.raises(DeploymentError, match=r"cannot load .*engine\.onnx"):
        OrtEngine(engine_path)


def test_dynamic_shapes_are_refused(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
    )
    path = tmp_path / "dynamic.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(DeploymentError, match="dynamic shape"):
        OrtEngine(path)


def test_threads_must_be_positive(engine_path):
    with pytest.raises(DeploymentError, match="threads"):
        OrtEngine(engine_path, threads=0)
