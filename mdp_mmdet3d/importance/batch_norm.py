"""Statistics of batch norms for what they are given now: a model that was cut feeds them something else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _NothingLeft(Exception):
    """The last batch norm of a forward pass has run."""


class _Moments:
    """Mean and variance per channel over everything that one batch norm is given."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0  # sum of squared distances from the mean

    def add(self, x: Tensor) -> None:
        """Merge a batch (N, C, ...) into the sums (Chan, Golub and LeVeque)."""
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = x.numel() // x.shape[1]
        variance, mean = (value.double() for value in torch.var_mean(x, dim=axes, correction=0))
        total = self.count + count
        shift = mean - self.mean
        self.squares = self.squares + variance * count + shift.square() * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Batch norms with statistics, by path."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }


def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any], *, calls: int | None = None
) -> None:
    """Set the statistics of all batch norms to those of their inputs over ``batches``, in place.

    Every batch norm normalises by the statistics of its batch meanwhile, so that one pass is enough; modes, momenta and
    all parameters stay as they were. A batch norm that does not run keeps its statistics.

    Args:
        model: In evaluation mode.
        batches: What to run on.
        forward: Runs the model on a batch.
        calls: Calls of batch norms in one forward pass, which ends behind the last of them; None runs all of it.
    """
    norms = list(batch_norms(model).values())
    moments = [_Moments() for _ in norms]
    before = [(norm.training, norm.momentum, norm.num_batches_tracked) for norm in norms]
    left = 0

    def read(total: _Moments) -> Callable[..., None]:
        def hook(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            total.add(inputs[0])
            norm.training = inputs[0].numel() > inputs[0].shape[1]  # one value per channel has no variance

        return hook

    def count(norm: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise _NothingLeft

    handles = [norm.register_forward_pre_hook(read(total)) for norm, total in zip(norms, moments)]
    handles += [norm.register_forward_hook(count) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0  # the statistics in use stay untouched
            if norm.num_batches_tracked is not None:  # a SyncBatchNorm wants one to count
                norm.num_batches_tracked = norm.num_batches_tracked.clone()
        with torch.no_grad():
            for batch in batches:
                left = -1 if calls is None else calls
                try:
                    forward(batch)
                except _NothingLeft:
                    continue
    finally:
        for handle in handles:
            handle.remove()
        for norm, (training, momentum, tracked) in zip(norms, before):
            norm.training, norm.momentum, norm.num_batches_tracked = training, momentum, tracked
    for norm, total in zip(norms, moments):
        if total.count > 1:
            norm.running_mean.copy_(total.mean)
            norm.running_var.copy_(total.squares / (total.count - 1))
