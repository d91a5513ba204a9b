from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from latency_spaces import EVERY_OPERATOR, small_space

from mdp_mmdet3d.latency import LatencyTable, grid_entries
from mdp_mmdet3d.latency.backends.onnxruntime import OnnxRuntimeBackend
from mdp_mmdet3d.latency.bundle import write_bundle

PROBE = Path(__file__).resolve().parents[2] / "mdp_mmdet3d" / "latency" / "probe"
POINTS = list(EVERY_OPERATOR.values())
ALLOWED = {"numpy", "onnxruntime", "tensorrt", "tensorrt_rtx", "onnxruntime_timer", "tensorrt_timer", "networks"}
CARRIED = [
    *sorted(PROBE.glob("*.py")),
    PROBE.parents[1] / "device.py",
    *(PROBE.parents[1] / "trt" / f"{n}.py" for n in ("__init__", "builder", "cuda")),
]
FROM_THE_PACKAGE = ("mdp_mmdet3d.device", "mdp_mmdet3d.errors", "mdp_mmdet3d.trt.", "mdp_mmdet3d.runtime.")


@pytest.fixture
def bundle(tmp_path) -> Path:
    write_bundle(POINTS, tmp_path / "bundle.zip")
    zipfile.ZipFile(tmp_path / "bundle.zip").extractall(tmp_path / "bundle")
    return tmp_path / "bundle"


def probe(bundle: Path, *arguments: str) -> subprocess.CompletedProcess:
    # -I: neither the current folder nor PYTHONPATH; this package cannot be found.
    program = f"import sys; sys.path.insert(0, {str(bundle)!r}); import probe; sys.exit(probe.main())"
    return subprocess.run([sys.executable, "-I", "-c", program, *arguments], cwd=bundle, capture_output=True, text=True)


@pytest.mark.parametrize("path", CARRIED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_probe_files_need_python_3_8_and_the_runtime_only(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    for node in ast.walk(tree):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for name in names:
            if name.startswith(FROM_THE_PACKAGE):
                continue
            assert name.split(".")[0] in ALLOWED | set(sys.stdlib_module_names), f"{path.name} imports {name}"
        # New since 3.9 or 3.10 and easily overlooked.
        assert not (isinstance(node, ast.Attribute) and node.attr in {"removesuffix", "removeprefix", "pairwise"})
        assert not (isinstance(node, ast.keyword) and node.arg == "strict")


def test_models_of_a_bundle_run_with_shared_weights(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert sum(len(o["probes"]) for o in manifest["operators"]) == len(POINTS)
    for operator in manifest["operators"]:
        for item in operator["probes"]:
            session = ort.InferenceSession(str(bundle / item["file"]), providers=["CPUExecutionProvider"])
            feed = {name: np.ones(shape, np.float32) for name, shape in item["inputs"].items()}
            assert all(np.isfinite(output).all() for output in session.run(None, feed))
            model = onnx.load(str(bundle / item["file"]), load_external_data=False)
            assert model.ByteSize() < 60_000


def test_the_probe_writes_a_table_that_this_machine_accepts(bundle):
    result = probe(bundle)
    assert result.returncode == 0, result.stderr
    table = LatencyTable.load(bundle / "latency_table.json", device=OnnxRuntimeBackend().device())
    table.require(OnnxRuntimeBackend().device(), OnnxRuntimeBackend().protocol)
    assert {(s, w) for s, w, _ in table} == set(POINTS)
    before = {(s, w): e.time for s, w, e in table if e.attempts == 1 and (s, w) not in table.disturbed()}
    assert probe(bundle).returncode == 0
    after = {(s, w): e.time for s, w, e in LatencyTable.load(bundle / "latency_table.json")}
    assert all(after[key] == moment for key, moment in before.items())


def test_killed_probes_lose_no_entry(tmp_path):
    keys = grid_entries(small_space())
    write_bundle(keys, tmp_path / "bundle.zip")
    zipfile.ZipFile(tmp_path / "bundle.zip").extractall(tmp_path / "bundle")
    bundle, out = tmp_path / "bundle", tmp_path / "bundle" / "latency_table.json"
    kept: dict = {}
    for delay in (0.0, 0.03, 0.11, 0.2, 0.05):
        process = subprocess.Popen([sys.executable, bundle / "probe.py"], cwd=bundle, stdout=subprocess.PIPE)
        os.read(process.stdout.fileno(), 1)  # the first progress message: something has been measured
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        now = {(s, w): e for s, w, e in LatencyTable.load(out)}
        assert set(kept) < set(now) or set(now) == set(keys)
        # What was measured stays as it is until everything was measured once.
        assert set(now) == set(keys) or all(now[key] == entry for key, entry in kept.items())
        kept = now
    assert probe(bundle).returncode == 0
    assert {(s, w) for s, w, _ in LatencyTable.load(out)} == set(keys)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda bundle: (bundle / "latency_table.json").write_text("{"), "damaged"),
        (lambda bundle: (bundle / "manifest.json").write_text(json.dumps({"schema_version": 9})), "schema_version 9"),
    ],
)
def test_damaged_files_are_refused_without_a_traceback(bundle, damage, message):
    damage(bundle)
    result = probe(bundle)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_tables_of_another_machine_are_not_continued(bundle):
    assert probe(bundle).returncode == 0
    path = bundle / "latency_table.json"
    data = json.loads(path.read_text())
    data["device"]["processor"] = "another one"
    path.write_text(json.dumps(data))
    result = probe(bundle)
    assert result.returncode == 2 and "another device" in result.stderr and "processor" in result.stderr


def test_a_table_that_is_mostly_disturbed_ends_with_a_warning(bundle):
    assert probe(bundle).returncode == 0
    path = bundle / "latency_table.json"
    data = json.loads(path.read_text())
    entries = [entry for operator in data["operators"] for entry in operator["entries"]]
    for busy, warned in ((4, False), (8, True)):
        for index, entry in enumerate(entries):
            entry.update(attempts=3, reference_ms=9.0 if index < busy else 1.0)
        path.write_text(json.dumps(data))
        result = probe(bundle)
        assert result.returncode == 0 and ("another --out" in result.stderr) == warned


def test_float16_bundles_are_for_tensorrt(tmp_path):
    write_bundle(POINTS, tmp_path / "b.zip", "float16")
    zipfile.ZipFile(tmp_path / "b.zip").extractall(tmp_path / "b")
    result = probe(tmp_path / "b")
    assert result.returncode == 2 and "float16" in result.stderr
    with pytest.raises(ValueError, match="at least one"):
        write_bundle([], tmp_path / "empty.zip")
    assert not (tmp_path / "empty.zip").exists()


@pytest.fixture
def network_bundle(tiny_deployment, tmp_path):
    """One operator and two whole networks; the second stands for a pruned one."""
    import shutil

    from mdp_mmdet3d.latency.bundle import BundleNetwork

    shutil.copytree(tiny_deployment, tmp_path / "network_1")
    networks = [
        BundleNetwork(tiny_deployment, "digest", {"stem": 16}, []),
        BundleNetwork(tmp_path / "network_1", "digest", {"stem": 8}, ["block"]),
    ]
    write_bundle(POINTS[:1], tmp_path / "bundle.zip", networks=networks)
    zipfile.ZipFile(tmp_path / "bundle.zip").extractall(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_whole_networks_are_measured_with_the_operators_and_kept(network_bundle, tiny_deployment):
    """With the shared file of weights, and neither torch nor onnx nor this package."""
    size = sum(path.stat().st_size for path in (network_bundle / "networks").rglob("*.onnx"))
    assert size < 0.5 * 2 * sum(path.stat().st_size for path in tiny_deployment.glob("*.onnx"))
    result = probe(network_bundle)
    assert result.returncode == 0, result.stderr
    assert "1 operators, 2 whole networks" in result.stdout and "measured while something else ran" in result.stdout
    path = network_bundle / "latency_table.json"
    table = LatencyTable.load(path)
    assert [network["name"] for network in table.networks] == ["dense", "network_1"]
    for network in table.networks:
        assert set(network["engines_ms"]) == {"image_encoder", "head"} and min(network["engines_ms"].values()) > 0
        assert network["model_digest"] == "digest" and network["attempts"] >= 1
    table.save(path)
    assert LatencyTable.load(path).networks == table.networks
    other = LatencyTable(table.device, table.protocol)
    other.merge(table)
    assert other.networks == table.networks and other.merge(table) == 0 and len(other.networks) == 2


def test_a_network_that_is_damaged_is_named(network_bundle):
    with (network_bundle / "networks/dense/head.onnx").open("ab") as stream:
        stream.write(b"x")
    result = probe(network_bundle)
    assert result.returncode == 2 and "head.onnx" in result.stderr and "Traceback" not in result.stderr
