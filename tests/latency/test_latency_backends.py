from __future__ import annotations

import onnx
import pytest
import torch
from latency_spaces import CONV, EVERY_OPERATOR

from mdp_mmdet3d.errors import MdpError, StructureMismatchError
from mdp_mmdet3d.latency import LatencyTable
from mdp_mmdet3d.latency.backends.roofline import DeviceFigures, RooflineBackend
from mdp_mmdet3d.latency.backends.torch import TorchBackend
from mdp_mmdet3d.latency.graphs import operator_graph
from mdp_mmdet3d.latency.probe.tensorrt_timer import kernel_signs
from mdp_mmdet3d.operators import OPERATORS
from mdp_mmdet3d.space import OperatorSignature
from mdp_mmdet3d.trt.builder import load_tensorrt, parse_kernels

every_operator = pytest.mark.parametrize("signature, widths", EVERY_OPERATOR.values(), ids=EVERY_OPERATOR.keys())
ORIN = DeviceFigures("Orin", peak_tflops=40, bandwidth_gb_s=200, launch_us=5)


@pytest.mark.parametrize(
    "signature, widths, gmacs",
    [
        (
            OperatorSignature.make(
                "conv",
                batch=6,
                height=64,
                width=176,
                kernel_h=3,
                kernel_w=3,
                stride=1,
                padding=1,
                groups=1,
                relu=True,
                residual=False,
            ),
            (64, 64),
            2.491,
        ),
        (
            OperatorSignature.make(
                "conv",
                batch=6,
                height=256,
                width=704,
                kernel_h=7,
                kernel_w=7,
                stride=2,
                padding=3,
                groups=1,
                relu=True,
                residual=False,
            ),
            (3, 64),
            10.18 / 4,
        ),
        (OperatorSignature.make("attention", queries=428, keys=4224, embed_dims=256, shared=False), (8, 32, 32), 1.535),
        (OperatorSignature.make("attention", queries=428, keys=812, embed_dims=256, shared=True), (8, 32, 32), 0.340),
        (OperatorSignature.make("ffn", tokens=428, embed_dims=256), (2048,), 0.449),
    ],
)
def test_multiply_accumulates_are_those_of_the_specification(signature, widths, gmacs):
    assert OPERATORS[signature.kind].work(signature, widths).macs / 1e9 == pytest.approx(gmacs, rel=2e-3)


@every_operator
def test_estimates_are_positive_and_wider_is_not_faster(signature, widths):
    backend = RooflineBackend(ORIN)
    narrow, wide = (
        entry.ms
        for _, entry in backend.measure([(signature, widths), (signature, tuple(2 * width for width in widths))])
    )
    assert 0 < narrow <= wide


def test_estimates_never_mix_with_measurements():
    estimate = RooflineBackend(ORIN)
    table = LatencyTable(estimate.device(), estimate.protocol)
    measured = LatencyTable(TorchBackend().device(), TorchBackend().protocol)
    with pytest.raises(StructureMismatchError, match="roofline"):
        measured.merge(table)
    faster = RooflineBackend(DeviceFigures("Orin", peak_tflops=80, bandwidth_gb_s=200, launch_us=5))
    assert estimate.device().differences(faster.device())
    with pytest.raises(ValueError, match="bandwidth_gb_s"):
        RooflineBackend(DeviceFigures("x", 1, 0, 0))


@every_operator
def test_pytorch_operators_have_the_outputs_of_the_onnx_graphs(signature, widths):
    operator, inputs = OPERATORS[signature.kind].torch_call(signature, widths)
    with torch.no_grad():
        shape = tuple(operator(*inputs).shape)
    graph = onnx.shape_inference.infer_shapes(operator_graph(signature, widths).model).graph
    before_sink = next(node for node in graph.node if node.output[0] == "sink").input[0]
    value = next(value for value in graph.value_info if value.name == before_sink)
    assert shape == tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    [(key, entry)] = TorchBackend(warmup=0, runs=2).measure([(signature, widths)])
    assert key == (signature, widths) and entry.ms > 0 and entry.runs == 2


def test_pytorch_leaves_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    list(TorchBackend(warmup=0, runs=1).measure([(CONV, (16, 16))]))
    assert torch.get_num_threads() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_named():
    with pytest.raises(MdpError, match="cuda"):
        TorchBackend("cuda")


def test_kernels_are_attributed_to_the_operator():
    record = "\n".join(
        [
            "Layers:",
            "Name: tran, LayerType: kgen, Inputs: [], Metadata: ",
            "Name: src_U1, LayerType: correlation, Inputs: [], Metadata: [ONNX Layer: source]",
            "Name: sync, LayerType: signal, Inputs: [], Metadata: ",
            "Name: move, LayerType: kgen, Inputs: [], Metadata: ",
            "Name: t_U2, LayerType: correlation, Inputs: [], Metadata: [ONNX Layer: target][ONNX Layer: target_relu]",
            "Name: off_U3, LayerType: correlation, Inputs: [], Metadata: [ONNX Layer: offset_fine]",
            "Name: mean, LayerType: kgen, Inputs: [], Metadata: [ONNX Layer: sink]",
        ]
    )
    kernels = parse_kernels(record)
    assert [kernel["name"] for kernel in kernels] == ["tran", "src_U1", "move", "t_U2", "off_U3", "mean"]
    assert kernels[3]["onnx_layers"] == ["target", "target_relu"]
    assert kernel_signs(kernels) == {"tran": 0, "src_U1": 0, "move": 1, "t_U2": 1, "off_U3": -1, "mean": 0}


@pytest.fixture
def trt():
    try:
        return load_tensorrt()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision, capability", [("float32", "8.6"), ("float16", "8.9")])
@every_operator
def test_tensorrt_builds_every_probe(trt, signature, widths, precision, capability):
    from mdp_mmdet3d.latency.backends.tensorrt import build_report

    report = build_report(operator_graph(signature, widths, precision).model.SerializeToString(), capability)
    assert 1 in kernel_signs(report["kernels"]).values()
    assert min(report["plan_bytes"], report["activation_bytes"], report["weights_bytes"] + 1) > 0


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_tensorrt_adds_the_residual_in_the_measured_convolution(trt, precision):
    from mdp_mmdet3d.latency.backends.tensorrt import build_report

    signature = OperatorSignature.make(
        "conv",
        batch=6,
        height=16,
        width=44,
        kernel_h=1,
        kernel_w=1,
        stride=1,
        padding=0,
        groups=1,
        relu=True,
        residual=True,
    )
    model = operator_graph(signature, (64, 256), precision).model.SerializeToString()
    kernels = build_report(model, "8.6")["kernels"]
    signs = kernel_signs(kernels)
    assert [set(k["onnx_layers"]) for k in kernels if signs[k["name"]] == 1] == [
        {"target", "target_sum", "target_relu"}
    ]


@pytest.mark.tensorrt
def test_tensorrt_names_what_it_refuses(trt, tmp_path):
    from mdp_mmdet3d.latency.backends.tensorrt import build_report

    with pytest.raises(MdpError, match="cannot parse"):
        build_report(b"no model")
    graph = operator_graph(CONV, (16, 16)).model.SerializeToString()
    with pytest.raises(MdpError, match=r"8\.7"):
        build_report(graph, "8.7")


@pytest.mark.tensorrt
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_tensorrt_without_a_gpu_points_to_the_bundle(trt):
    from mdp_mmdet3d.latency.backends.tensorrt import TensorRtBackend

    with pytest.raises(MdpError, match="--bundle"):
        TensorRtBackend()
