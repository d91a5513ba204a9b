from __future__ import annotations

import json

import numpy as np
import pytest

from mdp_mmdet3d.errors import FileFormatError
from mdp_mmdet3d.files import file_sha256, write_npz
from mdp_mmdet3d.runtime.manifest import (
    MANIFEST_FILE,
    DeploymentManifest,
    EngineSpec,
    ImageTransform,
    MemorySpec,
    TensorSpec,
)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(name.encode())
    points = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_npz(tmp_path / "init.npz", {"schema_version": 1}, {"pseudo_reference_points": points})
    spec = TensorSpec("x", "float32", (1, 2, 3))
    manifest = DeploymentManifest(
        engines={"a": EngineSpec("a.onnx", (spec,), (spec,)), "b": EngineSpec("b.onnx", (spec,), ())},
        layout="native",
        levels=1,
        num_queries=5,
        precision="float32",
        class_names=("car", "bus"),
        camera_names=("front",),
        image=ImageTransform((900, 1600), (396, 704), (140, 0), (256, 704), (1.0, 2.0, 3.0), (1.0, 1.0, 1.0), "RGB"),
        pc_range=(-1.0, -1.0, -1.0, 1.0, 1.0, 1.0),
        post_center_range=(-2.0, -2.0, -2.0, 2.0, 2.0, 2.0),
        max_detections=300,
        score_threshold=None,
        memory=MemorySpec(4, 6, 2, "init.npz"),
        plan_hash="0123",
        weights="random",
        software={"torch": "2"},
        checksums={name: file_sha256(tmp_path / name) for name in ("a.onnx", "b.onnx", "init.npz")},
    )
    manifest.save(tmp_path)
    return tmp_path, manifest


def test_load_gives_back_what_was_saved(folder):
    path, manifest = folder
    assert DeploymentManifest.load(path) == manifest
    assert manifest.pseudo_reference_points(path).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_changed_file_is_named(folder):
    path, _ = folder
    (path / "b.onnx").write_bytes(b"a.onnx")
    with pytest.raises(FileFormatError, match=r"b\.onnx has SHA-256.*export again"):
        DeploymentManifest.load(path)


@pytest.mark.parametrize("name", ["a.onnx", "init.npz", MANIFEST_FILE])
def test_missing_file_is_named(folder, name):
    path, _ = folder
    (path / name).unlink()
    with pytest.raises(FileFormatError, match=name):
        DeploymentManifest.load(path)


def test_truncated_manifest_is_refused(folder):
    path, _ = folder
    text = (path / MANIFEST_FILE).read_text()
    (path / MANIFEST_FILE).write_text(text[: len(text) // 2])
    with pytest.raises(FileFormatError, match="truncated"):
        DeploymentManifest.load(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("engines", {"a": {"file": "a.onnx"}}, "malformed"),
        ("memory", None, "malformed"),
        ("schema_version", 99, "schema_version 99"),
        ("checksums", {}, "no checksum"),
    ],
)
def test_malformed_manifest_is_refused(folder, key, value, message):
    path, _ = folder
    data = json.loads((path / MANIFEST_FILE).read_text())
    data[key] = value
    (path / MANIFEST_FILE).write_text(json.dumps(data))
    with pytest.raises(FileFormatError, match=message):
        DeploymentManifest.load(path)


def test_initial_memory_of_another_size_is_refused(folder):
    path, manifest = folder
    write_npz(path / "init.npz", {"schema_version": 1}, {"pseudo_reference_points": np.zeros((3, 3), np.float32)})
    with pytest.raises(FileFormatError, match=r"\(2, 3\)"):
        manifest.pseudo_reference_points(path)
