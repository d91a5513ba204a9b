"""What is no convolution, linear layer or attention is priced by the call that was seen, at the widths that it has."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from mmengine.config import Config
from torch import Tensor, nn

from mdp_mmdet3d.adapters import InputShape
from mdp_mmdet3d.adapters.single_graph import SingleGraph
from mdp_mmdet3d.latency.backends.roofline import DeviceFigures, RooflineBackend
from mdp_mmdet3d.latency.coverage import coverage, coverage_line, is_low
from mdp_mmdet3d.latency.graphs import operator_graph
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.predict import LatencyModel, MeasuredNetwork
from mdp_mmdet3d.operators import OPERATORS, OperatorSignature
from mdp_mmdet3d.operators.call import call_obstacle, call_text, number
from mdp_mmdet3d.space.builder import SpaceOptions
from mdp_mmdet3d.space.operations import record_operations
from mdp_mmdet3d.space.types import PruningSpace, WidthSum

FIGURES = DeviceFigures("a device", peak_tflops=1.0, bandwidth_gb_s=10.0, launch_us=1.0)


class Everything(nn.Module):
    """Norms, activations, gates, poolings, a transposed convolution and a concatenation of four."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.act = nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU()
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.b, self.gate = nn.Conv2d(32, 24, 1), nn.Conv2d(24, 24, 1)
        self.up = nn.ConvTranspose2d(24, 16, 2, 2)
        self.parts = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(4))
        self.out = nn.Conv2d(64, 5, 1)

    def forward(self, inputs: Tensor, data_samples=None, mode: str = "tensor") -> tuple[Tensor]:
        x = self.pool(self.act(self.norm(self.a(inputs))))
        x = self.b(x)
        x = self.up(x * nn.functional.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True))))
        return (self.out(torch.cat([part(x) for part in self.parts], dim=1)),)


@pytest.fixture(scope="module")
def traced() -> tuple[nn.Module, PruningSpace]:
    torch.manual_seed(0)
    model = Everything().eval()
    return model, SingleGraph(Config({}), InputShape(1, 48, 64)).trace(model, SpaceOptions(4, 4, 4))


def _call(space: PruningSpace, name: str) -> tuple[dict, tuple]:
    term = next(t for t in space.terms if t.name == name)
    return json.loads(term.signature["call"]), term.widths


def test_every_operator_has_a_term_with_the_widths_that_it_has(traced):
    _, space = traced
    assert not space.unpriced
    found, widths = _call(space, "norm")
    (dimension,) = widths  # counts groups of 8 channels
    assert space.by_name[dimension].size == 4
    assert found["function"].endswith("group_norm")
    assert found["arguments"][:2] == [{"input": [1, "8*$0", 48, 64]}, "$0"]
    assert _call(space, "act")[0]["arguments"] == [{"input": [1, "8*$0", 48, 64]}]
    assert _call(space, "pool")[0]["keywords"]["ceil_mode"] is True
    assert _call(space, "mul")[0]["arguments"] == [{"input": [1, "$0", 24, 32]}, {"input": [1, "$0", 1, 1]}]
    up, widths = _call(space, "up")
    assert up["arguments"][:3] == [{"input": [1, "$0", 24, 32]}, {"weight": ["$0", "$1", 2, 2]}, {"weight": ["$1"]}]
    assert widths == ("b.out", "up.out")
    # Of four parts only their sum counts, the one that the convolution behind them reads.
    assert _call(space, "cat")[1] == next(t for t in space.terms if t.name == "out").widths[:1]
    assert isinstance(_call(space, "cat")[1][0], WidthSum)


def test_a_probe_computes_what_the_function_does(traced):
    """At other widths than the recorded ones: sources, the exported call and a sink, run by ONNX Runtime."""
    _, space = traced
    for name in ("norm", "act", "pool", "mul", "up", "cat"):
        term = next(t for t in space.terms if t.name == name)
        widths = tuple(3 if name == "norm" else 20 for _ in term.widths)
        graph = operator_graph(term.signature, widths)
        session = ort.InferenceSession(graph.model.SerializeToString(), providers=["CPUExecutionProvider"])
        feed = {k: np.random.default_rng(0).standard_normal(s).astype(np.float32) for k, s in graph.inputs.items()}
        call, inputs = OPERATORS[term.signature.kind].torch_call(term.signature, widths)
        (found,) = session.run(None, feed)
        with torch.no_grad():
            expected = call(*inputs)
        assert found.shape[:2] == expected.shape[:2]
        assert sum(node.name.startswith("target") for node in graph.model.graph.node) >= 1
        assert OPERATORS[term.signature.kind].work(term.signature, widths).elements > sum(i.numel() for i in inputs)
    term = next(t for t in space.terms if t.name == "up")
    pixels = 24 * 32
    assert OPERATORS["call_2"].work(term.signature, (12, 8)).macs == pixels * 12 * 8 * 4


@pytest.mark.parametrize("written, value", [("$0", 7), ("8*$0", 56), ("64+$0+2*$1", 77), ("-16+4*$1", -4)])
def test_written_numbers(written, value):
    assert number(written, (7, 3)) == value


def test_what_a_runtime_cannot_run_is_named():
    text = call_text("torch.linalg.svdvals", [{"input": [4, "$0"]}], {})
    assert "no ONNX form" in call_obstacle(OperatorSignature.make("call", call=text), (4,))
    text = call_text("torch.Tensor.reshape", [{"input": [4, "$0"]}, -1], {})
    assert call_obstacle(OperatorSignature.make("call", call=text), (4,)) == "moves no data"
    text = call_text("torch.Tensor.isnan", [{"input": [1, 3, "$0"]}], {})  # a probe pools what it returns
    assert "other than real numbers" in call_obstacle(OperatorSignature.make("call", call=text), (4,))


class Odd(nn.Module):
    """An operator without ONNX form behind prunable channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 5, 1)

    def forward(self, inputs: Tensor, data_samples=None, mode: str = "tensor") -> tuple[Tensor]:
        x = self.a(inputs)
        return (self.b(x + torch.special.i0e(x)),)


def test_coverage_names_what_is_not_priced(tmp_path):
    torch.manual_seed(0)
    model = Odd().eval()
    space = SingleGraph(Config({}), InputShape(1, 32, 32)).trace(model, SpaceOptions(4, 4, 4))
    assert [(u.engine, u.operator, u.count) for u in space.unpriced] == [("model", "i0e", 1)]
    space.save(tmp_path / "space.json")
    assert PruningSpace.load(tmp_path / "space.json") == space
    table = measure_latency(space, RooflineBackend(FIGURES), tmp_path / "table.json", progress=False)
    sizes = {d.name: d.size for d in space.dimensions}
    terms = sum(table.lookup(t.signature, t.counts(sizes)).ms for t in space.terms)
    networks = [MeasuredNetwork(sizes, (), {"model": 2 * terms}), MeasuredNetwork({"a.out": 8}, (), {"model": terms})]
    (found,) = coverage(LatencyModel.fit(space, table, networks))
    assert found.dense_ms == 2 * terms and found.priced_ms == pytest.approx(terms) and found.share == pytest.approx(0.5)
    entry = found.to_json()
    assert is_low(entry) and coverage_line(entry).startswith("50% of model's") and "i0e x 1" in coverage_line(entry)


def test_operations_are_recorded_with_their_modules_and_readers():
    torch.manual_seed(0)
    model = Everything().train()
    operations, opaque = record_operations(model, lambda: model(torch.rand(1, 3, 16, 16)), follow=True)
    assert model.training and not opaque
    seen = {(o.module, o.name): o for o in operations}
    assert seen["norm", "group_norm"].reads[0] == operations.index(seen["a", "conv2d"])
    assert seen["up", "conv_transpose2d"].output == (1, 16, 16, 16)
    assert [o.index for o in operations if o.name == "conv2d" and o.module == "a"] == [0]
