"""What stands where a block was removed; it is called as the block was."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class RemovedSubLayer(nn.Module):
    """In place of a sub-layer that added something to its input: returns what it would have added to.

    That is ``identity`` where it is given by name or as the last of several inputs (mmcv's FFN and attention), else the
    first input (``query``).
    """

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The stream, unchanged."""
        if named.get("identity") is not None:
            return named["identity"]
        return inputs[0] if inputs else named["query"]


class RemovedBranch(nn.Module):
    """In place of a branch that the caller adds to its stream: a scalar 0, which runtimes leave out.

    Args:
        weights: Whether it is returned with None, as `torch.nn.MultiheadAttention` returns its weights.
    """

    # What torch.nn.TransformerEncoderLayer reads to see that its fused form does not apply.
    batch_first = _qkv_same_embed_dim = False

    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, *inputs: Any, **named: Any) -> Tensor | tuple[Tensor, None]:
        """A scalar 0 of the first input's type."""
        first = inputs[0] if inputs else next(value for value in named.values() if isinstance(value, Tensor))
        zero = first.new_zeros(())
        return (zero, None) if self.weights else zero
