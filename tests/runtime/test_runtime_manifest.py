from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mdp_mmdet3d.errors import FileFormatError
from mdp_mmdet3d.files import file_sha256, write_npz
from mdp_mmdet3d.runtime.manifest import DIGEST, MANIFEST_FILE, DeploymentManifest
from mdp_mmdet3d.runtime.onnx_file import onnx_facts


@pytest.fixture
def folder(tiny_deployment, tmp_path):
    return shutil.copytree(tiny_deployment, tmp_path / "deployment")


def change(folder, edit, *, signed=False):
    """Edit the manifest's JSON; without the digest it is one of the first release."""
    path = folder / MANIFEST_FILE
    data = json.loads(path.read_text())
    if not signed:
        del data[DIGEST]
    edit(data)
    path.write_text(json.dumps(data))


def test_load_gives_back_what_was_saved(folder):
    manifest = DeploymentManifest.load(folder)
    manifest.save(folder)
    assert DeploymentManifest.load(folder) == manifest
    assert manifest.pseudo_reference_points(folder).shape == (16, 3)


def test_unsigned_manifests_of_the_first_release_are_read(folder):
    manifest = DeploymentManifest.load(folder)
    change(folder, lambda data: data.update(precision="fp32"))
    assert DeploymentManifest.load(folder) == manifest


@pytest.mark.parametrize("key", ["plan_hash", "weights", "checks"])
def test_a_change_after_signing_is_seen(folder, key):
    change(folder, lambda data: data.update({key: {"x": 1} if key == "checks" else "other"}), signed=True)
    with pytest.raises(FileFormatError, match="was changed after it was written"):
        DeploymentManifest.load(folder)


def test_changed_file_is_named(folder):
    (folder / "head.onnx").write_bytes(b"other")
    with pytest.raises(FileFormatError, match=r"head\.onnx has SHA-256.*export again"):
        DeploymentManifest.load(folder)


@pytest.mark.parametrize("name", ["head.onnx", "init_memory.npz", MANIFEST_FILE])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileFormatError, match=name):
        DeploymentManifest.load(folder)


def test_truncated_manifest_is_refused(folder):
    text = (folder / MANIFEST_FILE).read_text()
    (folder / MANIFEST_FILE).write_text(text[: len(text) // 2])
    with pytest.raises(FileFormatError, match="truncated"):
        DeploymentManifest.load(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("engines", {"head": {"file": "head.onnx"}}, "malformed"),
        ("memory", None, "malformed"),
        ("schema_version", 99, "schema_version 99"),
        ("checksums", {}, "no checksum"),
        ("precision", "int8", "precision is 'int8', but the graphs are float32"),
        ("precision", "bfloat16", "none of float32, float16, int8"),
        ("layout", "nchw", "layout is 'nchw'"),
        ("layout", "autoware", r"all_cls_scores .*layout autoware.* make \(1, 10, 76\)"),
        ("num_queries", 7, r"shape \(1, 1, 76, 10\).* make \(1, 1, 7, 10\)"),
        ("num_queries", True, "not a whole number"),
        ("max_detections", -3, "max_detections is -3"),
        ("score_threshold", 2, "score_threshold is 2"),
        ("score_threshold", "0.1", "score_threshold is '0.1'"),
        ("class_names", "car", "not a list of names"),
        ("class_names", ["car"] * 10, "names one twice"),
        ("camera_names", ["a", "b"], r"2 cameras.*"),
        ("post_center_range", [1, 2, 3], "post_center_range"),
        ("pc_range", [1, 1, 1, -1, -1, -1], "pc_range"),
        ("plan_hash", 7, "plan_hash is 7"),
    ],
)
def test_what_the_manifest_says_is_checked(folder, key, value, message):
    change(folder, lambda data: data.update({key: value}))
    with pytest.raises(FileFormatError, match=message):
        DeploymentManifest.load(folder)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("memory", "pre_length", 63, r"pre_length is 63, pre_memory_.* of the graphs has 64 rows"),
        ("memory", "pre_length", "64", "not a whole number of rows"),
        ("memory", "num_propagated", 70, "must not decrease"),
        ("image", "size", [64, 64], r"img of the graphs has shape \(1, 6, 3, 64, 176\)"),
        ("image", "std", [0, 1, 1], "std positive"),
        ("image", "channel_order", "GBR", "neither RGB nor BGR"),
        ("image", "resized_size", [0, 10], "image.resized_size"),
        ("memory", "init_file", "/etc/hostname", "not inside its folder"),
    ],
)
def test_sections_are_checked(folder, section, key, value, message):
    change(folder, lambda data: data[section].update({key: value}))
    with pytest.raises(FileFormatError, match=message):
        DeploymentManifest.load(folder)


@pytest.mark.parametrize("name", ["../head.onnx", "/tmp/head.onnx", "sub/head.onnx", ""])
def test_paths_stay_inside_the_folder(folder, name):
    (folder.parent / "head.onnx").write_bytes((folder / "head.onnx").read_bytes())
    change(folder, lambda data: data["engines"]["head"].update(file=name))
    with pytest.raises(FileFormatError, match="not inside its folder"):
        DeploymentManifest.load(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_graphs_with_weights_that_are_not_finite_are_refused(folder, value):
    path = folder / "image_encoder.onnx"
    graph = onnx.load(path)
    weight = next(tensor for tensor in graph.graph.initializer if len(tensor.dims) == 4)
    values = numpy_helper.to_array(weight).copy()
    values.flat[-1] = value
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(graph, str(path))
    change(folder, lambda data: data["checksums"].update({path.name: file_sha256(path)}))
    with pytest.raises(FileFormatError, match=r"image_encoder\.onnx: 1 weights hold NaN or infinity"):
        DeploymentManifest.load(folder)


def test_onnx_files_are_read_without_onnx(tmp_path):
    """Every way in which a tensor may be stored, against the onnx package."""
    from onnx import TensorProto, helper

    floats = helper.make_tensor("floats", TensorProto.FLOAT, [2], [1.0, float("nan")])  # float_data, not raw_data
    half = numpy_helper.from_array(np.array([1, np.inf], np.float16), "half")
    whole = numpy_helper.from_array(np.array([1, 2], np.int64), "whole")
    mask = numpy_helper.from_array(np.array([[0, -np.inf]], np.float32), "mask")
    bound = numpy_helper.from_array(np.array(np.inf, np.float32), "bound")
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.float32([np.nan]), "inner"))
    graph = helper.make_graph([constant], "g", [], [], [floats, half, whole, mask, bound])
    path = tmp_path / "x.onnx"
    onnx.save(helper.make_model(graph), str(path))
    facts = onnx_facts(path)
    assert facts.precision == "float16"
    assert set(facts.not_finite) == {"floats", "half", "inner"}
    for content in (b"", b"not a graph", path.read_bytes()[:-3]):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"x\.onnx is no ONNX file"):
            onnx_facts(path)


def test_initial_memory_of_another_size_or_not_finite_is_refused(folder):
    manifest = DeploymentManifest.load(folder)
    for points in (np.zeros((3, 3), np.float32), np.full((16, 3), np.nan, np.float32)):
        write_npz(folder / "init_memory.npz", {"schema_version": 1}, {"pseudo_reference_points": points})
        with pytest.raises(FileFormatError, match=r"\(16, 3\)"):
            manifest.pseudo_reference_points(folder)
