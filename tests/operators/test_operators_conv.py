"""A convolution's probe, PyTorch call and work are those of the real convolution, whatever its sizes."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mdp_mmdet3d.latency.graphs import operator_graph
from mdp_mmdet3d.operators import OPERATORS, ConvGeometry, OperatorSignature
from mdp_mmdet3d.space.conv import conv_geometry

USUAL = dict(batch=1, height=12, width=16, kernel_h=3, kernel_w=3, stride=1, padding=1, groups=1)
USUAL |= dict(relu=True, residual=False)


def pair(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 2, 4]))
    ci, co = (groups * draw(st.integers(4, 8)) for _ in range(2))
    sizes = [draw(s) for s in (pair(1, 4), pair(1, 3), pair(0, 3), pair(1, 3))]
    return nn.Conv2d(ci, co, *sizes, groups=groups)


def signature_of(conv, batch, height, width, residual=False):
    return OperatorSignature.make(
        "conv",
        batch=batch,
        height=height,
        width=width,
        relu=False,
        residual=residual,
        **conv_geometry(conv).attributes(),
    )


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.integers(1, 2), pair(10, 17), st.booleans())
def test_probe_call_and_work_have_the_sizes_of_the_convolution(conv, batch, size, residual):
    with torch.no_grad():
        real = conv(torch.zeros(batch, conv.in_channels, *size))
    signature, widths = signature_of(conv, batch, *size, residual), (conv.in_channels, conv.out_channels)
    assert ConvGeometry.of(signature) == conv_geometry(conv)
    graph = onnx.shape_inference.infer_shapes(operator_graph(signature, widths).model, strict_mode=True).graph
    value = next(v for v in graph.value_info if v.name == ("target_sum" if residual else "target"))
    assert tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) == tuple(real.shape)
    call, inputs = OPERATORS["conv"].torch_call(signature, widths)
    with torch.no_grad():
        assert call(*inputs).shape == real.shape
    weights = conv.weight.numel()
    assert OPERATORS["conv"].work(signature, widths).macs == real.numel() // conv.out_channels * weights


def test_multiply_accumulates_of_a_dilated_convolution_counted_by_hand():
    conv = nn.Conv2d(8, 4, (3, 5), stride=(1, 2), padding=(2, 0), dilation=(2, 3))
    # Rows: (10 + 4 - 2 * 2 - 1) + 1 = 10; columns: (20 - 3 * 4 - 1) // 2 + 1 = 4.
    work = OPERATORS["conv"].work(signature_of(conv, 3, 10, 20), (8, 4))
    assert work.macs == 3 * 10 * 4 * (4 * 8 * 3 * 5)


def test_the_probe_computes_the_dilated_convolution():
    conv = nn.Conv2d(8, 4, 3, stride=(1, 2), padding=(2, 1), dilation=(2, 3))
    graph = operator_graph(signature_of(conv, 1, 9, 14), (8, 4))
    weights = {t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in graph.model.graph.initializer}
    conv.load_state_dict({"weight": weights["target.weight"], "bias": weights["target.bias"]})
    x = np.random.default_rng(0).standard_normal(graph.inputs["image"], dtype=np.float32)
    (out,) = ort.InferenceSession(graph.model.SerializeToString()).run(None, {"image": x})
    with torch.no_grad():
        expected = conv(torch.tensor(x)).mean(dim=(2, 3), keepdim=True)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_usual_values_are_no_part_of_a_signature():
    plain = OperatorSignature.make("conv", **USUAL)
    assert OperatorSignature.make("conv", **USUAL, dilation_h=1, dilation_w=1, stride_w=1, padding_w=1) == plain
    assert "dilation" not in plain.key
    dilated = OperatorSignature.make("conv", **USUAL, dilation_h=2, dilation_w=2)
    assert dilated != plain and "dilation_h=2" in dilated.key


@pytest.mark.parametrize("change, named", [({"groups": None}, "groups"), ({"padding_mode": "reflect"}, "padding_mode")])
def test_missing_and_unknown_attributes_are_refused(change, named):
    attributes = {name: value for name, value in {**USUAL, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=named):
        OperatorSignature.make("conv", **attributes)


def test_operators_and_the_data_above_them_import_neither_torch_nor_onnx():
    program = (
        "import sys, mdp_mmdet3d.operators, mdp_mmdet3d.space, mdp_mmdet3d.latency;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnx', 'onnxruntime', 'mmengine')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
