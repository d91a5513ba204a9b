"""Execution providers of GPUs: selection with what is installed here, timing with the CPU in the GPU's place."""

from __future__ import annotations

import onnxruntime as ort
import pytest
from latency_spaces import CONV, EVERY_OPERATOR

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.latency.backends import onnxruntime_gpu
from mdp_mmdet3d.latency.backends.onnxruntime import OnnxRuntimeBackend
from mdp_mmdet3d.latency.backends.onnxruntime_gpu import PROVIDERS, GpuTimer, context_model
from mdp_mmdet3d.latency.graphs import operator_graph

every_operator = pytest.mark.parametrize("signature, widths", EVERY_OPERATOR.values(), ids=EVERY_OPERATOR.keys())


@pytest.fixture
def cpu_as_gpu(monkeypatch):
    monkeypatch.setattr(onnxruntime_gpu, "PROVIDERS", dict.fromkeys(PROVIDERS, "CPUExecutionProvider"))
    monkeypatch.setattr(GpuTimer, "_memory", "cpu")
    monkeypatch.setattr(GpuTimer, "_device_name", lambda self: "a GPU")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_missing_provider_is_named(provider):
    if PROVIDERS[provider] in ort.get_available_providers():
        pytest.skip("it is there")
    with pytest.raises(MdpError, match=rf"onnxruntime-{provider} .* has no {PROVIDERS[provider]}, only .*CPU.*-gpu"):
        OnnxRuntimeBackend(provider)


def test_a_provider_that_cannot_be_loaded_is_no_silent_fallback(cpu_as_gpu, monkeypatch):
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda self: ["AnotherExecutionProvider"])
    with pytest.raises(MdpError, match="took AnotherExecutionProvider"):
        OnnxRuntimeBackend("cuda")


def test_float16_on_the_cpu_is_refused():
    with pytest.raises(MdpError, match="in float32, not in float16"):
        OnnxRuntimeBackend(precision="float16")


def test_the_fingerprint_says_which(cpu_as_gpu):
    cuda, trt = (OnnxRuntimeBackend(name, warmup=0, runs=1).device() for name in ("cuda", "tensorrt"))
    assert (cuda.processor, cuda.runtime) == ("a GPU", "onnxruntime-cuda")
    assert any(line.startswith("runtime:") for line in cuda.differences(trt))
    assert cuda.differences(OnnxRuntimeBackend().device())


@every_operator
def test_operators_are_measured_by_what_they_add(cpu_as_gpu, signature, widths):
    [(key, entry)] = OnnxRuntimeBackend("cuda", warmup=1, runs=3).measure([(signature, widths)])
    assert key == (signature, widths) and entry.ms >= 0 and entry.runs == 3 and entry.reference_ms > 0


@every_operator
def test_the_context_has_no_target(signature, widths):
    graph = operator_graph(signature, widths)
    context = context_model(graph.model.SerializeToString())
    if context is None:
        assert not any(node.name.startswith("source") for node in graph.model.graph.node)
        return
    ort.InferenceSession(context.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [node.name for node in context.graph.node]
    assert not any(name.startswith("target") for name in names)
    sources = {node.name for node in graph.model.graph.node if node.name.startswith(("source", "offset"))}
    assert sources <= set(names)


def test_the_context_of_a_residual_convolution_keeps_both_branches():
    signature = next(s for s, _ in EVERY_OPERATOR.values() if s.kind == "conv" and s["residual"])
    widths = next(w for s, w in EVERY_OPERATOR.values() if s == signature)
    context = context_model(operator_graph(signature, widths).model.SerializeToString())
    assert {"source", "source_shortcut"} <= {node.name for node in context.graph.node}
    assert len(context.graph.output) == 2
    assert context_model(operator_graph(CONV, (16, 16)).model.SerializeToString()) is not None
