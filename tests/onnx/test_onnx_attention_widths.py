from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from mdp_mmdet3d.onnx.attention_widths import pad_attention
from mdp_mmdet3d.onnx.export import export_onnx
from mdp_mmdet3d.onnx.precision import to_float16
from projects.streampetr.attention import MultiheadAttention

from ..numerics import LAYER, assert_close


class Wrapped(nn.Module):
    def __init__(self, heads: int, qk: int, v: int) -> None:
        super().__init__()
        attn = MultiheadAttention(64, heads, qk, v, scale=0.2)
        nn.init.normal_(attn.in_proj_bias)
        nn.init.normal_(attn.out_proj.bias)
        self.layers = nn.ModuleList([nn.ModuleList([attn])])

    def forward(self, query, key, value):
        return self.layers[0][0](query, key, value)


class Itself(Wrapped):
    """Query, key and value from one tensor: onnxslim makes Gemm of some projections."""

    def forward(self, query, key, value):
        query = query + torch.cat([key[:, :5], value[:, :4]], 1)
        return self.layers[0][0](query, query, query)


def export(path, heads, qk, v, kind=Wrapped, simplify=True):
    torch.manual_seed(heads * 100 + qk)
    inputs = {"q": torch.rand(1, 9, 64), "k": torch.rand(1, 20, 64), "v": torch.rand(1, 20, 64)}
    return export_onnx(kind(heads, qk, v).eval(), inputs, ["out"], path, simplify=simplify)


def run(graph):
    rng = np.random.default_rng(0)
    feeds = {v.name: rng.standard_normal([d.dim_value for d in v.type.tensor_type.shape.dim]).astype(np.float32)
             for v in graph.graph.input}  # fmt: skip
    return ort.InferenceSession(graph.SerializeToString()).run(None, feeds)[0]


def head_widths(graph):
    constants = {t.name: t for t in graph.graph.initializer}
    shapes = [numpy_helper.to_array(constants[n.input[1]]) for n in graph.graph.node if n.op_type == "Reshape"]
    return {int(shape[3]) for shape in shapes if len(shape) == 4}


@pytest.mark.parametrize("kind", [Wrapped, Itself])
@pytest.mark.parametrize("simplify", [True, False])
@pytest.mark.parametrize(
    ("heads", "qk", "v", "width"),
    [(3, 20, 12, 24), (2, 24, 32, 32), (2, 32, 8, 32), (5, 4, 4, 16), (2, 16, 17, 24)],
)
@pytest.mark.numerics
def test_padded_attention_has_one_width_and_computes_the_same(tmp_path, heads, qk, v, width, kind, simplify):
    graph = export(tmp_path / "a.onnx", heads, qk, v, kind, simplify)
    padded, names = pad_attention(graph)
    assert len(names) == 1
    assert head_widths(padded) == {width}
    assert_close(run(padded), run(graph), LAYER)
    assert head_widths(graph) == {qk, v}, "the given graph is left as it is"
    assert pad_attention(padded)[1] == ()


@pytest.mark.parametrize(("heads", "qk", "v", "simplify"), [(4, 16, 16, True), (1, 8, 8, True), (1, 8, 16, False)])
def test_an_attention_that_fits_is_left_alone_and_a_single_head(tmp_path, heads, qk, v, simplify):
    graph = export(tmp_path / "a.onnx", heads, qk, v, simplify=simplify)
    padded, names = pad_attention(graph)
    assert names == () and padded == graph


def test_a_projection_that_something_else_reads_is_left_alone(tmp_path):
    graph = export(tmp_path / "a.onnx", 3, 20, 12)
    transpose = next(n for n in graph.graph.node if n.op_type == "Transpose")
    reshape = next(n for n in graph.graph.node if n.output[0] == transpose.input[0])
    graph.graph.node.append(onnx.helper.make_node("Relu", [reshape.output[0]], ["other"], name="other"))
    assert pad_attention(graph)[1] == ()


@pytest.mark.tensorrt
@pytest.mark.parametrize(("qk", "v"), [(24, 32), (16, 8)])
def test_tensorrt_fuses_only_the_padded_attention(tmp_path, qk, v):
    trt = pytest.importorskip("tensorrt_rtx", exc_type=ImportError, reason="tensorrt_rtx is not installed")
    from mdp_mmdet3d.trt.build import build_engine

    graph = export(tmp_path / "a.onnx", 4, qk, v)
    fused = []
    for index, item in enumerate((graph, pad_attention(graph)[0])):
        path = tmp_path / f"{index}.onnx"
        onnx.save(to_float16(item, "image_encoder"), str(path))
        report = build_engine(trt, path, "8.6", tmp_path / "cache")[1]
        fused.append(any("mha" in kernel["name"] for kernel in report["kernels"]))
    assert fused == [False, True]


@pytest.mark.tensorrt
def test_tensorrt_fuses_no_single_head(tmp_path):
    """Why single heads are not padded; if this fails, pad them too."""
    trt = pytest.importorskip("tensorrt_rtx", exc_type=ImportError, reason="tensorrt_rtx is not installed")
    from mdp_mmdet3d.trt.build import build_engine

    onnx.save(to_float16(export(tmp_path / "a.onnx", 1, 16, 16), "image_encoder"), str(tmp_path / "b.onnx"))
    report = build_engine(trt, tmp_path / "b.onnx", "8.6", tmp_path / "cache")[1]
    assert not any("mha" in kernel["name"] for kernel in report["kernels"])
