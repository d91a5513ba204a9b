from __future__ import annotations

import errno
import os
import shutil

import onnx
import pytest
from onnx import TensorProto, helper

from mdp_mmdet3d.errors import FileFormatError, WriteError
from mdp_mmdet3d.onnx.reduce import reduce_precision
from mdp_mmdet3d.runtime.graph_manifest import load_manifest
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.trt.build import (
    EngineBuildError,
    TargetError,
    build_engine,
    build_engines,
    read_engines,
    split_convolutions,
)
from mdp_mmdet3d.trt.report import engine_report

from ..tiny_deployment import make_frames

trt = pytest.importorskip("tensorrt_rtx", exc_type=ImportError, reason="tensorrt_rtx or its bindings are not installed")

pytestmark = pytest.mark.tensorrt


@pytest.fixture
def deployment(tiny_deployment, tmp_path):
    folder = tmp_path / "deploy"
    shutil.copytree(tiny_deployment, folder)
    return folder


def test_engines_are_built_for_two_targets_and_listed(deployment):
    for capability in ("8.6", "8.9"):
        build_engines(deployment, load_manifest(deployment), capability)
    targets = read_engines(deployment)["targets"]
    assert targets.keys() == {"sm86", "sm89"}
    manifest = DeploymentManifest.load(deployment)
    for target in targets.values():
        assert target["library"] in ("tensorrt", "tensorrt_rtx") and target["version"]
        for name, engine in target["engines"].items():
            assert (deployment / engine["file"]).stat().st_size == engine["plan_bytes"] > 0
            assert engine["onnx_sha256"] == manifest.checksums[f"{name}.onnx"]
            assert len(engine["kernels"]) > 3 and engine["activation_bytes"] > 0
    report = engine_report([deployment, deployment])
    assert "## sm86" in report and "## sm89" in report
    count = len(targets["sm86"]["engines"]["head"]["kernels"])
    assert f"| head | kernels | {count} | {count} |" in report and "/layers.1/attentions.1" in report
    kernels = targets["sm86"]["engines"]["image_encoder"]["kernels"]
    layers = [layer for kernel in kernels for layer in kernel["onnx_layers"]]
    assert any("layer3" in layer for layer in layers)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_reduced_precision_builds_smaller_engines(tiny_deployment, tmp_path, precision):
    reduce_precision(tiny_deployment, tmp_path / "out", precision, make_frames(2))
    for name in ("image_encoder", "head") if precision == "float16" else ("image_encoder",):
        dense, reduced = (
            build_engine(trt, folder / f"{name}.onnx", "8.6", tmp_path / "cache")[0]
            for folder in (tiny_deployment, tmp_path / "out")
        )
        assert len(reduced) < 0.8 * len(dense)


def test_convolutions_that_run_as_two_kernels_are_counted():
    layers = [["/a/Conv", "/a/Relu"], ["/b/Conv", "/b/Conv.weight.DQ"], ["/b/Conv", "/b/Relu", "/b/Relu_output_0.Q"],
              ["/c/Conv_1"], []]  # fmt: skip
    assert split_convolutions({"kernels": [{"onnx_layers": names} for names in layers]}) == (1, 3)


@pytest.mark.parametrize(("capability", "reason"), [("8.7", "JetPack"), ("9.0", "data-centre"), ("1.0", "known are")])
def test_a_refused_target_is_explained(deployment, capability, reason):
    with pytest.raises(TargetError, match=reason):
        build_engines(deployment, load_manifest(deployment), capability)
    assert not list(deployment.glob("*.engine")) and not (deployment / "engines.json").exists()


def test_the_parser_names_the_node(tmp_path):
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], name="/head/culprit", domain="custom")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("custom", 1)]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(tmp_path / "bad.onnx"))
    with pytest.raises(EngineBuildError, match="culprit") as caught:
        build_engine(trt, tmp_path / "bad.onnx", "8.6", tmp_path / "cache")
    assert "/head/culprit" in caught.value.nodes


def test_truncated_onnx_is_refused(deployment, tmp_path):
    content = (deployment / "head.onnx").read_bytes()[:5000]
    (tmp_path / "cut.onnx").write_bytes(content)
    with pytest.raises(EngineBuildError, match=r"cut\.onnx"):
        build_engine(trt, tmp_path / "cut.onnx", "8.6", tmp_path / "cache")
    (deployment / "head.onnx").write_bytes(content)
    with pytest.raises(FileFormatError, match="truncated or replaced"):
        build_engines(deployment, load_manifest(deployment), "8.6")


def test_a_disk_that_is_full_at_the_second_engine_leaves_the_earlier_build(deployment, monkeypatch):
    plans = iter([b"old"] * 3 + [b"new"])

    def build(*_):
        if (plan := next(plans, None)) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plan, {"kernels": []}

    monkeypatch.setattr("mdp_mmdet3d.trt.build.build_engine", build)
    manifest = load_manifest(deployment)
    build_engines(deployment, manifest, "8.6")
    before = {path: path.read_bytes() for path in deployment.iterdir()}
    with pytest.raises(WriteError, match=rf"cannot write {deployment}: No space left"):
        build_engines(deployment, manifest, "8.6")
    assert {path: path.read_bytes() for path in deployment.iterdir()} == before
    assert (deployment / "head.sm86.engine").read_bytes() == b"old"
