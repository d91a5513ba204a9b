from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from latency_spaces import CONV, CROSS_ATTENTION, EVERY_OPERATOR, RESIDUAL

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.latency import LatencyTable
from mdp_mmdet3d.latency.backends.onnxruntime import OnnxRuntimeBackend
from mdp_mmdet3d.latency.graphs import operator_graph
from mdp_mmdet3d.latency.probe.onnxruntime_timer import OnnxRuntimeTimer, measured_kernels
from mdp_mmdet3d.operators.base import DECODER_COPIES
from mdp_mmdet3d.space import OperatorSignature

ROOT = Path(__file__).resolve().parents[2]
every_operator = pytest.mark.parametrize("signature, widths", EVERY_OPERATOR.values(), ids=EVERY_OPERATOR.keys())


def run(graph):
    session = ort.InferenceSession(graph.model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    return session.run(None, {k: rng.standard_normal(v).astype(np.float32) for k, v in graph.inputs.items()})


def initializers(graph):
    return {tensor.name: tuple(tensor.dims) for tensor in graph.model.graph.initializer}


@every_operator
def test_operator_graphs_are_valid_and_run(signature, widths):
    graph = operator_graph(signature, widths)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(graph.model), full_check=True)
    assert all(np.isfinite(output).all() for output in run(graph))


def test_weights_have_the_shapes_of_the_widths():
    assert initializers(operator_graph(CONV, (32, 48)))["target.weight"] == (48, 32, 3, 3)
    attention = initializers(operator_graph(CROSS_ATTENTION, (3, 8, 4)))
    for copy in range(DECODER_COPIES):
        assert attention[f"target{copy}_q.weight"] == attention[f"target{copy}_k.weight"] == (32, 24)
        assert attention[f"target{copy}_v.weight"] == (32, 12)
        assert attention[f"target{copy}_out.weight"] == (12, 32)


def test_the_residual_is_produced_by_a_convolution_and_read_by_the_addition_only():
    graph = operator_graph(RESIDUAL, (16, 64)).model.graph
    made_by = {node.output[0]: node for node in graph.node}
    target, shortcut = next(node for node in graph.node if node.op_type == "Add").input
    assert made_by[target].op_type == made_by[made_by[shortcut].input[0]].op_type == "Conv"
    assert made_by[shortcut].op_type == "Relu"  # as in the network
    for value in (target, shortcut, made_by[shortcut].input[0]):
        assert sum(value in node.input for node in graph.node) == 1


def test_the_residual_is_fused(tmp_path):
    graph = operator_graph(RESIDUAL, (16, 64))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(graph.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert "Add" not in kinds and "Relu" not in kinds


@every_operator
def test_every_operator_is_measured(signature, widths):
    backend = OnnxRuntimeBackend(max_runs=4)
    [(key, entry)] = list(backend.measure([(signature, widths)]))
    assert key == (signature, widths)
    assert entry.runs == 4 and entry.attempts == 1 and entry.reference_ms > 0
    assert entry.ms > 0 or signature.kind == "upsample_add"
    table = LatencyTable(backend.device(), backend.protocol)
    table.add(signature, widths, entry)


def test_kernels_of_the_context_are_left_out_and_offsets_subtracted():
    def event(name, ms):
        return {"name": f"{name}_kernel_time", "dur": ms * 1000}

    events = [
        event(name, ms)
        for ms in (7, 1, 2)
        for name in ("source_nchwc", "target_nchwc", "target_sum", "sink", "ReorderInput", "ReorderOutput_token_3")
    ]
    events += [event("offset_fine", 0.5)] * 3 + [{"name": "model_run", "dur": 9e9}]
    assert measured_kernels(events, 1, 2) == [(1, [1, 2]), (1, [1, 2]), (-1, [0.5, 0.5])]
    with pytest.raises(RuntimeError, match="expected 4"):
        measured_kernels(events, 1, 3)
    with pytest.raises(RuntimeError, match="holds no runs"):
        measured_kernels([event("sink", 1)], 0, 1)


def test_of_several_loads_the_fastest_counts(monkeypatch):
    monkeypatch.setattr(OnnxRuntimeTimer, "_session", lambda timer, *arguments: (None, {}))
    monkeypatch.setattr(OnnxRuntimeTimer, "_run", lambda timer, session, feed: 0.004)
    timer = OnnxRuntimeTimer((b"", {}), loads=3)
    assert timer.protocol() != OnnxRuntimeTimer((b"", {}), loads=2).protocol()
    loads = [{"ms": ms, "spread": 0.01, "runs": runs} for ms, runs in ((3.0, 4), (2.0, 7), (2.5, 5))]
    monkeypatch.setattr(OnnxRuntimeTimer, "_measure_load", lambda timer, *arguments: loads.pop(0))
    assert timer.measure(b"", {}, 1) == {"ms": 2.0, "spread": 0.01, "runs": 7, "reference_ms": 4.0}
    assert not loads


def test_every_load_is_a_session_of_its_own(monkeypatch):
    backend, opened = OnnxRuntimeBackend(loads=2, max_runs=4), []
    session = OnnxRuntimeTimer._session
    monkeypatch.setattr(OnnxRuntimeTimer, "_session", lambda timer, *a: opened.append(a) or session(timer, *a))
    list(backend.measure([(CONV, (32, 48))]))
    assert len(opened) == 2


def test_removed_operators_and_unknown_fusions_are_refused():
    with pytest.raises(ValueError, match="widths"):
        operator_graph(CONV, (0, 16))
    odd = OperatorSignature.make("linear", tokens=4, norm="batch", activation="none")
    with pytest.raises(ValueError, match="norm must be"):
        operator_graph(odd, (16, 16))


def test_what_the_runtime_refuses_is_named():
    seven = OperatorSignature.make("conv", **{**dict(CONV.attributes), "groups": 7})
    with pytest.raises(MdpError, match=r"groups=7.*\(32, 48\).*fails"):
        list(OnnxRuntimeBackend().measure([(seven, (32, 48))]))


@pytest.mark.parametrize(
    "options", [{"loads": 0}, {"warmup": -1}, {"min_runs": 0}, {"min_runs": 9, "max_runs": 8}, {"tolerance": 0}]
)
def test_impossible_protocols_are_refused(options):
    with pytest.raises(ValueError, match="must satisfy"):
        OnnxRuntimeBackend(**options)


def test_tables_need_neither_torch_nor_a_runtime():
    program = (
        "import sys; import mdp_mmdet3d.latency; "
        "heavy = {'torch', 'mmengine', 'mmcv', 'onnx', 'onnxruntime', 'scipy'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
