"""Max-pooling with a square window."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mdp_mmdet3d.operators.base import SOURCE_CHANNELS, GraphBuilder, OperatorKind, OperatorSignature, Work

if TYPE_CHECKING:
    from torch import Tensor


class MaxPool(OperatorKind):
    """Max-pooling of (batch, channels, height, width): window, stride and padding alike along both axes."""

    name = "max_pool"
    roles = ("channels",)
    attributes = ("batch", "height", "width", "kernel", "stride", "padding")

    def work(self, signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
        """Reads the map, writes the smaller one."""
        pixels = signature["batch"] * signature["height"] * signature["width"]
        return Work(0.0, widths[0] * pixels * (1 + 1 / signature["stride"] ** 2), 1)

    def graph(self, build: GraphBuilder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
        """A pooling behind a convolution."""
        seed = build.input("seed", signature["batch"], SOURCE_CHANNELS, signature["height"], signature["width"])
        x = build.conv(seed, "source", SOURCE_CHANNELS, widths[0])
        kernel, stride = signature["kernel"], signature["stride"]
        build.pool_sink(
            build.node(
                "MaxPool",
                [x],
                "target",
                kernel_shape=[kernel, kernel],
                strides=[stride, stride],
                pads=[signature["padding"]] * 4,
            )
        )
        return 1

    def torch_call(
        self, signature: OperatorSignature, widths: tuple[int, ...]
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """`torch.nn.MaxPool2d`."""
        import torch
        from torch import nn

        x = torch.randn(signature["batch"], widths[0], signature["height"], signature["width"])
        return nn.MaxPool2d(signature["kernel"], signature["stride"], signature["padding"]), (x,)
