"""Grouped convolution that loses whole groups, each with its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from mdp_mmdet3d.operators.base import Attribute, GraphBuilder, OperatorKind, OperatorSignature, Work
from mdp_mmdet3d.operators.conv import Conv

if TYPE_CHECKING:
    from torch import Tensor


class GroupedConv(OperatorKind):
    """Convolution of (batch, groups * inputs, height, width) to groups * outputs channels; else as `Conv`."""

    name = "grouped_conv"
    roles = ("groups",)
    attributes = (*(name for name in Conv.attributes if name != "groups"), "inputs", "outputs")
    optional = Conv.optional
    samples: ClassVar[Mapping[str, int | None]] = {"groups": 5}
    _conv = Conv()

    def canonical(self, attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
        """As `Conv`."""
        return self._conv.canonical(attributes)

    def work(self, signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
        """As `Conv`."""
        return self._conv.work(*_conv_of(signature, widths))

    def graph(self, build: GraphBuilder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
        """As `Conv`."""
        return self._conv.graph(build, *_conv_of(signature, widths))

    def torch_call(
        self, signature: OperatorSignature, widths: tuple[int, ...]
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """As `Conv`."""
        return self._conv.torch_call(*_conv_of(signature, widths))


def _conv_of(signature: OperatorSignature, widths: tuple[int, ...]) -> tuple[OperatorSignature, tuple[int, int]]:
    (groups,) = widths
    attributes = dict(signature.attributes)
    inputs, outputs = int(attributes.pop("inputs")), int(attributes.pop("outputs"))
    return OperatorSignature.make("conv", **attributes, groups=groups), (groups * inputs, groups * outputs)
