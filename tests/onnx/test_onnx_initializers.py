from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.onnx.export import export_onnx
from mdp_mmdet3d.onnx.initializers import check_initializers, module_path


def one_node(op, name, weight, out_shape, in_shape):
    node = helper.make_node(op, ["x", "w"], ["y"], name=name)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, in_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out_shape)],
        [numpy_helper.from_array(np.zeros(weight, np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def conv(name="/stem/conv/Conv", out_channels=8):
    return one_node("Conv", name, (out_channels, 3, 3, 3), [1, out_channels, 2, 2], [1, 3, 4, 4])


def linear(name, weight):
    return one_node("MatMul", name, weight, [2, weight[1]], [2, weight[0]])


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/neck/convs.0/conv/Conv", ["neck", "convs", "0", "conv"]),
        ("/backbone/layer1/layer1.0/conv1/Conv", ["backbone", "layer1", "0", "conv1"]),
        ("/fc.0/fc.0.0/MatMul_output_0", ["fc", "0", "0"]),
        ("/l.2/ffns.0/layers/layers.0/layers.0.1/MatMul", ["l", "2", "ffns", "0", "layers", "0", "1"]),
        ("/MatMul", []),
    ],
)
def test_module_path_of_exporter_names(name, path):
    assert module_path(name) == path


def test_convolutions_are_compared_by_module():
    shapes = {"stem.conv.weight": (8, 3, 3, 3), "other.conv.weight": (6, 3, 3, 3)}
    assert check_initializers(conv(), shapes) == {"stem.conv.weight"}
    with pytest.raises(DeploymentError, match=r"\(6, 3, 3, 3\).*stem\.conv\.weight.*\(8, 3, 3, 3\)"):
        check_initializers(conv(out_channels=6), shapes)


def test_linear_weights_may_be_transposed_but_not_of_another_size():
    assert check_initializers(linear("/a/fc/MatMul", (4, 7)), {"a.fc.weight": (7, 4)}) == {"a.fc.weight"}
    with pytest.raises(DeploymentError, match=r"a\.fc\.weight"):
        check_initializers(linear("/a/fc/MatMul", (4, 6)), {"a.fc.weight": (7, 4)})


def test_containers_that_are_never_called_and_repeated_calls_are_found():
    shapes = {
        "head.transformer.decoder.layers.1.fc.weight": (7, 4),
        "head.transformer.decoder.layers.0.fc.weight": (7, 9),
    }
    assert check_initializers(linear("/head/decoder/layers.1/fc_1/MatMul", (4, 7)), shapes) == {
        "head.transformer.decoder.layers.1.fc.weight"
    }


def test_module_whose_name_ends_in_a_number_is_found():
    shapes = {"stage4.OSA4_1.layers.0.OSA4_1_0/conv.weight": (8, 3, 3, 3)}
    assert check_initializers(conv("/stage4/OSA4_1/layers.0/OSA4_1_0/conv/Conv"), shapes) == set(shapes)


def test_packed_projections_add_up():
    nodes, constants = [], []
    for index, rows in enumerate((6, 6, 10)):
        nodes.append(helper.make_node("MatMul", ["x", f"w{index}"], [f"y{index}"], name=f"/l.0/attn/MatMul_{index}"))
        constants.append(numpy_helper.from_array(np.zeros((4, rows), np.float32), f"w{index}"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [2, n]) for i, n in enumerate((6, 6, 10))],
        constants,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    assert check_initializers(proto, {"l.0.attn.in_proj_weight": (22, 4)}) == {"l.0.attn.in_proj_weight"}
    with pytest.raises(DeploymentError, match=r"in_proj_weight hold 88 .*\(24, 4\)"):
        check_initializers(proto, {"l.0.attn.in_proj_weight": (24, 4)})


def test_a_graph_of_another_model_is_refused():
    with pytest.raises(DeploymentError, match="another model"):
        check_initializers(conv(), {"unrelated.weight": (8, 3, 3, 3)})


def test_torchs_attention_holds_its_out_projection_too(tmp_path):
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(16, 2)

        def forward(self, query, value):
            return self.attn(query, query, value, need_weights=False)[0]

    model = Attention().eval()
    inputs = (torch.randn(5, 1, 16), torch.randn(5, 1, 16))
    torch.onnx.export(model, inputs, str(tmp_path / "model.onnx"), dynamo=False)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert "attn.in_proj_weight" in check_initializers(tmp_path / "model.onnx", shapes)
    with pytest.raises(DeploymentError, match="in_proj_weight"):
        check_initializers(tmp_path / "model.onnx", {**shapes, "attn.in_proj_weight": (36, 16)})


def test_queries_that_are_a_constant_have_lost_their_projection(tmp_path):
    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = torch.nn.Parameter(torch.randn(5, 1, 16))
            self.attn = torch.nn.MultiheadAttention(16, 2)

        def forward(self, tokens):
            return self.attn(self.queries, tokens, tokens)[0]

    model = Decoder().eval()
    path = tmp_path / "model.onnx"
    graph = export_onnx(model, {"tokens": torch.randn(7, 1, 16)}, ["y"], path)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    left = sorted(tuple(tensor.dims) for tensor in graph.graph.initializer if len(tensor.dims) > 1)
    assert left == [(2, 5, 8), (16, 16), (32, 16)]  # the queries, out, k and v together
    assert check_initializers(graph, shapes) >= {"attn.in_proj_weight"}
    with pytest.raises(DeploymentError, match="in_proj_weight"):
        check_initializers(graph, {**shapes, "attn.in_proj_weight": (48, 15)})
