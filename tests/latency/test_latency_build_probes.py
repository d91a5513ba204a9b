from __future__ import annotations

import json

import pytest
from latency_spaces import EVERY_OPERATOR
from rich.console import Console

from mdp_mmdet3d.errors import MdpError, StructureMismatchError
from mdp_mmdet3d.latency import build_probes as module
from mdp_mmdet3d.latency.build_probes import build_probes, compute_capability, refused, summary_line

POINTS = list(EVERY_OPERATOR.values())
QUIET = Console(quiet=True)


class Trt:
    __name__, __version__ = "tensorrt_rtx", "1"


@pytest.fixture
def built(monkeypatch):
    """Engines that are not built: the number of calls, the third one is refused."""
    calls = []

    def report(model, capability):
        calls.append(capability)
        if len(calls) == 3:
            raise MdpError("TensorRT cannot build it")
        kernel = lambda name: {"name": name, "type": "kgen", "onnx_layers": [name]}  # noqa: E731
        mixed = {"name": "both", "type": "kgen", "onnx_layers": ["source_shortcut", "target_sum"]}
        return {
            "kernels": [kernel("source"), kernel("target"), mixed],
            "weights_bytes": 1,
            "activation_bytes": 2**20,
            "scratch_bytes": 0,
            "plan_bytes": 1,
            "seconds": 0.5,
        }

    monkeypatch.setattr(module, "load_tensorrt", lambda: Trt)
    monkeypatch.setattr(module, "build_report", report)
    return calls


def test_every_probe_is_built_once_and_refusals_are_kept(tmp_path, built):
    path = tmp_path / "probes.json"
    result = build_probes(POINTS, "float32", "8.6", path, QUIET)
    assert json.loads(path.read_text()) == result
    assert {(p["operator"], tuple(p["widths"])) for p in result["probes"]} == {(s.key, w) for s, w in POINTS}
    assert [p["error"] for p in refused(result)] == ["TensorRT cannot build it"]
    assert [k["role"] for k in result["probes"][0]["kernels"]] == ["context", "target", "mixed"]
    assert f"{len(POINTS) - 1} of {len(POINTS)} probes" in summary_line(result)
    assert build_probes(POINTS, "float32", "8.6", path, QUIET) == result and len(built) == len(POINTS)
    with pytest.raises(StructureMismatchError, match="precision, capability"):
        build_probes(POINTS, "float16", "8.9", path, QUIET)


def test_an_interrupted_build_goes_on(tmp_path, built, monkeypatch):
    path = tmp_path / "probes.json"
    with monkeypatch.context() as patch:

        def stop(model, capability):
            raise KeyboardInterrupt

        build_probes(POINTS[:2], "float32", "8.6", path, QUIET)
        patch.setattr(module, "build_report", stop)
        with pytest.raises(KeyboardInterrupt):
            build_probes(POINTS, "float32", "8.6", path, QUIET)
    assert len(build_probes(POINTS, "float32", "8.6", path, QUIET)["probes"]) == len(POINTS) == len(built)


@pytest.mark.parametrize("target, capability", [("sm86", "8.6"), ("8.9", "8.9"), ("SM120", "12.0")])
def test_targets(target, capability):
    assert compute_capability(target) == capability


def test_a_target_that_is_none():
    with pytest.raises(MdpError, match="'orin' is no compute capability"):
        compute_capability("orin")
