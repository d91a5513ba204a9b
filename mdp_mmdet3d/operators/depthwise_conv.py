"""Depthwise convolution: every channel has a kernel of its own, so input and output have one count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from mdp_mmdet3d.operators.base import Attribute, GraphBuilder, OperatorKind, OperatorSignature, Work
from mdp_mmdet3d.operators.conv import Conv

if TYPE_CHECKING:
    from torch import Tensor


class DepthwiseConv(OperatorKind):
    """Convolution of (batch, channels, height, width) with as many groups as channels; else as `Conv`."""

    name = "depthwise_conv"
    roles = ("channels",)
    attributes = tuple(name for name in Conv.attributes if name != "groups")
    optional = Conv.optional
    samples: ClassVar[Mapping[str, int | None]] = {"channels": 5}
    _conv = Conv()

    def canonical(self, attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
        """As `Conv`."""
        return self._conv.canonical(attributes)

    def work(self, signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
        """As a grouped convolution."""
        return self._conv.work(*_grouped(signature, widths))

    def graph(self, build: GraphBuilder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
        """As a grouped convolution."""
        return self._conv.graph(build, *_grouped(signature, widths))

    def torch_call(
        self, signature: OperatorSignature, widths: tuple[int, ...]
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """As a grouped convolution."""
        return self._conv.torch_call(*_grouped(signature, widths))


def _grouped(signature: OperatorSignature, widths: tuple[int, ...]) -> tuple[OperatorSignature, tuple[int, int]]:
    (channels,) = widths
    return OperatorSignature.make("conv", **dict(signature.attributes), groups=channels), (channels, channels)
