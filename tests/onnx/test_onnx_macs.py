"""Multiply-accumulates of exported graphs against the ones counted by hand."""

import pytest
import torch
from torch import nn

from mdp_mmdet3d.onnx.macs import count_macs


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)  # (2, 12, 8)
        return self.linear(tokens) @ self.linear(tokens).transpose(1, 2)


@pytest.mark.parametrize("bias", [True, False])
def test_convolution_linear_and_product(tmp_path, bias):
    net = Net().eval()
    if not bias:
        net.linear.bias = None
    torch.onnx.export(net, (torch.zeros(2, 4, 8, 6),), str(tmp_path / "net.onnx"), dynamo=False, opset_version=17)
    conv = 2 * (4 * 3) * 8 * (4 // 2 * 9)
    linear = 2 * 12 * 8 * 5
    product = 2 * 12 * 12 * 5
    # The exporter may or may not share the two equal linear layers.
    assert count_macs(tmp_path / "net.onnx") in (conv + linear + product, conv + 2 * linear + product)


def test_gemm(tmp_path):
    torch.onnx.export(nn.Linear(7, 3), (torch.zeros(5, 7),), str(tmp_path / "l.onnx"), dynamo=False, opset_version=17)
    assert count_macs(tmp_path / "l.onnx") == 5 * 7 * 3
