"""What a module returns, with some of its channels only."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class KeptChannels:
    """Forward hook that keeps channels of what a module returns.

    Args:
        axis: Axis of the channels.
        kept: Their indices, increasing.
    """

    def __init__(self, axis: int, kept: Tensor) -> None:
        self.axis, self.kept = axis, kept

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """``output`` with the kept channels."""
        return output.index_select(self.axis, self.kept.to(output.device))


def keep_output(module: nn.Module, axis: int, kept: Tensor) -> None:
    """Let a module without weights return some channels only: of a constant, or of what a layer norm is given.

    A layer norm has their dense indices as ``kept_channels`` then.
    """
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape, module.kept_channels = (len(kept),), kept
        return
    module.register_forward_hook(KeptChannels(axis, kept))
