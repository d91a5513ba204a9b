from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.onnx.lint import (
    TOPK_LIMIT,
    LintRule,
    lint_onnx,
    require_clean,
)

F32 = TensorProto.FLOAT


def model(nodes, inputs, outputs, constants=None, domains=()):
    """inputs/outputs: name -> (type, shape); constants: name -> array."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
        [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def rules_at(proto, node):
    return {finding.rule for finding in lint_onnx(proto) if finding.node == node}


def test_clean_graph_has_no_findings():
    proto = model(
        [
            helper.make_node("Mul", ["x", "two"], ["m"], name="mul"),
            helper.make_node("TopK", ["m", "k"], ["v", "i"], name="top", axis=1),
        ],
        {"x": (F32, [1, TOPK_LIMIT + 10])},
        {"v": (F32, [1, TOPK_LIMIT]), "i": (TensorProto.INT64, [1, TOPK_LIMIT])},
        {"two": np.float32(2), "k": np.array([TOPK_LIMIT])},
    )
    assert lint_onnx(proto) == []


def test_topk_limit_is_exact():
    proto = model(
        [helper.make_node("TopK", ["x", "k"], ["v", "i"], name="top", axis=1)],
        {"x": (F32, [1, 5000])},
        {"v": (F32, [1, TOPK_LIMIT + 1]), "i": (TensorProto.INT64, [1, TOPK_LIMIT + 1])},
        {"k": np.array([TOPK_LIMIT + 1])},
    )
    assert rules_at(proto, "top") == {LintRule.TOPK}


def test_computed_topk_k_is_refused():
    proto = model(
        [helper.make_node("TopK", ["x", "k"], ["v", "i"], name="top", axis=1)],
        {"x": (F32, [1, 50]), "k": (TensorProto.INT64, [1])},
        {"v": (F32, [1, 5]), "i": (TensorProto.INT64, [1, 5])},
    )
    assert LintRule.TOPK in rules_at(proto, "top")


def test_float64_cast_inside_a_float32_graph_is_found_at_the_node():
    proto = model(
        [
            helper.make_node("Cast", ["x"], ["d"], name="up", to=TensorProto.DOUBLE),
            helper.make_node("Sin", ["d"], ["s"], name="sin64"),
            helper.make_node("Cast", ["s"], ["y"], name="down", to=F32),
        ],
        {"x": (F32, [2])},
        {"y": (F32, [2])},
    )
    assert rules_at(proto, "up") == {LintRule.FLOAT64}
    assert rules_at(proto, "sin64") == {LintRule.FLOAT64}
    assert rules_at(proto, "down") == set()


@pytest.mark.parametrize("where", ["input", "initializer"])
def test_float64_values_are_refused(where):
    node = helper.make_node("Add", ["x", "c"], ["y"], name="add")
    if where == "input":
        proto = model(
            [node],
            {"x": (TensorProto.DOUBLE, [2]), "c": (TensorProto.DOUBLE, [2])},
            {"y": (TensorProto.DOUBLE, [2])},
        )
        assert rules_at(proto, "x") == {LintRule.FLOAT64}
    else:
        cast = helper.make_node("Cast", ["c"], ["c32"], to=F32, name="cast")
        node.input[1] = "c32"
        proto = model([cast, node], {"x": (F32, [2])}, {"y": (F32, [2])}, {"c": np.ones(2)})
        assert rules_at(proto, "c") == {LintRule.FLOAT64}


def test_boolean_mask_is_refused():
    proto = model(
        [
            helper.make_node("Greater", ["x", "zero"], ["mask"], name="gt"),
            helper.make_node("NonZero", ["mask"], ["index"], name="select"),
            helper.make_node("Gather", ["x", "index"], ["y"], name="gather"),
        ],
        {"x": (F32, [4])},
        {"y": (F32, [1, "n"])},
        {"zero": np.float32(0)},
    )
    assert LintRule.DATA_DEPENDENT_SHAPE in rules_at(proto, "select")
    assert LintRule.DYNAMIC_DIM in rules_at(proto, "y")


def test_compress_is_refused():
    proto = model(
        [helper.make_node("Compress", ["x", "mask"], ["y"], name="compress", axis=0)],
        {"x": (F32, [4]), "mask": (TensorProto.BOOL, [4])},
        {"y": (F32, ["n"])},
    )
    assert LintRule.DATA_DEPENDENT_SHAPE in rules_at(proto, "compress")


@pytest.mark.parametrize(
    ("op", "domain", "rule"),
    [
        ("Inverse", "com.microsoft", LintRule.MATRIX_INVERSE),
        ("EfficientNMS_TRT", "trt", LintRule.NMS),
        ("ATen", "org.pytorch.aten", LintRule.CUSTOM_OP),
    ],
)
def test_foreign_operators_are_refused(op, domain, rule):
    proto = model(
        [helper.make_node(op, ["x"], ["y"], name="foreign", domain=domain)],
        {"x": (F32, [4, 4])},
        {"y": (F32, [4, 4])},
        domains=[domain],
    )
    assert rule in rules_at(proto, "foreign")


def test_standard_nms_is_refused():
    proto = model(
        [helper.make_node("NonMaxSuppression", ["b", "s"], ["i"], name="nms")],
        {"b": (F32, [1, 8, 4]), "s": (F32, [1, 2, 8])},
        {"i": (TensorProto.INT64, ["n", 3])},
    )
    assert LintRule.NMS in rules_at(proto, "nms")


def test_forbidden_operator_inside_a_branch_is_found():
    def branch(op):
        nodes = [helper.make_node(op, ["x"], ["o"], name=f"inner_{op}")]
        return helper.make_graph(nodes, op, [], [helper.make_tensor_value_info("o", TensorProto.INT64, None)])

    proto = model(
        [helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch("NonZero"), else_branch=branch("Shape"))],
        {"c": (TensorProto.BOOL, []), "x": (F32, [4])},
        {"y": (TensorProto.INT64, None)},
    )
    assert LintRule.CONTROL_FLOW in rules_at(proto, "if")
    assert LintRule.DATA_DEPENDENT_SHAPE in rules_at(proto, "inner_NonZero")
    assert not any(finding.rule is LintRule.DEAD_INPUT for finding in lint_onnx(proto))


@pytest.mark.parametrize("dim", ["batch", -1, 0, None])
def test_dynamic_dims_are_refused(dim):
    proto = model([helper.make_node("Relu", ["x"], ["y"], name="relu")], {"x": (F32, [dim, 3])}, {"y": (F32, [dim, 3])})
    assert rules_at(proto, "x") == {LintRule.DYNAMIC_DIM}


def test_dead_inputs_are_refused_even_if_a_dead_node_reads_them():
    proto = model(
        [
            helper.make_node("Relu", ["x"], ["y"], name="relu"),
            helper.make_node("Neg", ["z"], ["w"], name="neg"),
        ],
        {"x": (F32, [3]), "z": (F32, [3]), "t": (F32, [1])},
        {"y": (F32, [3])},
    )
    assert {f.node for f in lint_onnx(proto) if f.rule is LintRule.DEAD_INPUT} == {"z", "t"}


def test_require_clean_lists_every_finding_with_its_remedy():
    proto = model(
        [
            helper.make_node("Cast", ["x"], ["d"], name="up", to=TensorProto.DOUBLE),
            helper.make_node("Cast", ["d"], ["y"], name="down", to=F32),
        ],
        {"x": (F32, [3]), "t": (F32, [1])},
        {"y": (F32, [3])},
    )
    with pytest.raises(DeploymentError, match=r"(?s)head\.onnx.*2 finding.*'up'.*'t'.*remove it"):
        require_clean(proto, "head.onnx")


def test_unreadable_files_are_refused(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a graph at all")
    with pytest.raises(DeploymentError, match=r"broken\.onnx"):
        lint_onnx(path)
    path.write_bytes(b"")
    with pytest.raises(DeploymentError, match=r"broken\.onnx"):
        lint_onnx(path)


def test_loading_a_saved_model_gives_the_same_findings(tmp_path):
    proto = model([helper.make_node("Relu", ["x"], ["y"], name="r")], {"x": (F32, ["n"])}, {"y": (F32, ["n"])})
    onnx.save(proto, tmp_path / "m.onnx")
    assert lint_onnx(tmp_path / "m.onnx") == lint_onnx(proto) != []
