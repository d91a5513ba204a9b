"""Convolution with folded norm, and the ReLU and addend that it is fused with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mdp_mmdet3d.operators.base import (
    SOURCE_CHANNELS,
    Attribute,
    GraphBuilder,
    OperatorKind,
    OperatorSignature,
    Work,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ConvGeometry:
    """Sizes of a convolution along (height, width), zero padding on both sides alike.

    Attributes:
        kernel: Pixels of the kernel.
        stride: Step between outputs.
        padding: Zeros in front and behind.
        dilation: Step between the pixels that a kernel reads.
        groups: Independent parts of the channels.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, signature: OperatorSignature) -> ConvGeometry:
        """Read a signature; what it does not name has the usual value."""
        stride, padding = signature["stride"], signature["padding"]
        return cls(
            (signature["kernel_h"], signature["kernel_w"]),
            (stride, signature.get("stride_w", stride)),
            (padding, signature.get("padding_w", padding)),
            (signature.get("dilation_h", 1), signature.get("dilation_w", 1)),
            signature["groups"],
        )

    def attributes(self) -> dict[str, Attribute]:
        """The part of a signature's attributes that `of` reads."""
        return {
            "kernel_h": self.kernel[0],
            "kernel_w": self.kernel[1],
            "stride": self.stride[0],
            "stride_w": self.stride[1],
            "padding": self.padding[0],
            "padding_w": self.padding[1],
            "dilation_h": self.dilation[0],
            "dilation_w": self.dilation[1],
            "groups": self.groups,
        }

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output of a map (height, width)."""
        rows, columns = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                (height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return rows, columns


class Conv(OperatorKind):
    """Convolution of (batch, in_channels, height, width); height and width are those of the input.

    ``stride`` and ``padding`` hold along both axes unless ``stride_w`` and ``padding_w`` say otherwise for the width.
    """

    name = "conv"
    roles = ("in_channels", "out_channels")
    attributes = (
        "batch",
        "height",
        "width",
        "kernel_h",
        "kernel_w",
        "stride",
        "padding",
        "groups",
        "relu",
        "residual",
    )
    optional = ("stride_w", "padding_w", "dilation_h", "dilation_w")

    def canonical(self, attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
        """Without a dilation of 1 and without a stride and padding along the width that are those of the height."""
        usual = {
            "stride_w": attributes["stride"],
            "padding_w": attributes["padding"],
            "dilation_h": 1,
            "dilation_w": 1,
        }
        return {name: value for name, value in attributes.items() if name not in usual or value != usual[name]}

    def work(self, signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
        """One kernel: products of every output pixel with its kernel."""
        ci, co = widths
        batch, height, width = signature["batch"], signature["height"], signature["width"]
        geometry = ConvGeometry.of(signature)
        rows, columns = geometry.output(height, width)
        pixels = batch * rows * columns
        weights = co * ci // geometry.groups * geometry.kernel[0] * geometry.kernel[1]
        outputs = pixels * co * (2 if signature["residual"] else 1)
        return Work(pixels * weights, batch * height * width * ci + weights + outputs, 1)

    def graph(self, build: GraphBuilder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
        """A convolution behind one that gives its input the runtime's layout; a stem reads the image itself."""
        ci, co = widths
        batch, height, width = signature["batch"], signature["height"], signature["width"]
        geometry = ConvGeometry.of(signature)
        rows, columns = geometry.output(height, width)
        if rows < 1 or columns < 1:
            raise ValueError(f"{signature.key}: the kernel does not fit into the map")
        if ci < SOURCE_CHANNELS:
            x = build.input("image", batch, ci, height, width)
        else:
            x = build.conv(build.input("seed", batch, SOURCE_CHANNELS, height, width), "source", SOURCE_CHANNELS, ci)
        shortcut = ""
        if signature["residual"]:
            # ONNX Runtime fuses an addend only if it comes from a convolution and feeds nothing else; behind a ReLU, as
            # in the network, TensorRT adds it in the measured convolution and not in the one that makes it.
            seed = build.input("shortcut_seed", batch, SOURCE_CHANNELS, rows, columns)
            shortcut = build.conv(seed, "source_shortcut", SOURCE_CHANNELS, co)
            shortcut = build.node("Relu", [shortcut], "source_shortcut_relu")
        out = build.conv(
            x,
            "target",
            ci,
            co,
            kernel=geometry.kernel,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
        )
        if shortcut:
            out = build.node("Add", [out, shortcut], "target_sum")
        if signature["relu"]:
            out = build.node("Relu", [out], "target_relu")
        build.pool_sink(out)
        return 1

    def torch_call(
        self, signature: OperatorSignature, widths: tuple[int, ...]
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The convolution, then addition and ReLU in place."""
        import torch
        from torch import nn

        geometry = ConvGeometry.of(signature)

        class Call(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(
                    *widths,
                    geometry.kernel,
                    geometry.stride,
                    geometry.padding,
                    geometry.dilation,
                    groups=geometry.groups,
                )

            def forward(self, x: Tensor, *residual: Tensor) -> Tensor:
                x = self.conv(x)
                if residual:
                    x = x.add_(residual[0])
                return x.relu_() if signature["relu"] else x

        call = Call()
        x = torch.randn(signature["batch"], widths[0], signature["height"], signature["width"])
        with torch.no_grad():
            return call, (x, torch.randn_like(call.conv(x))) if signature["residual"] else (x,)
