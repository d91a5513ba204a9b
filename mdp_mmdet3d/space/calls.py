"""What ran in a forward pass: every module's calls with shapes and the tensors that connect them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mdp_mmdet3d.layers.evaluation import evaluating


@dataclass(frozen=True)
class Call:
    """One call of a module whose only positional tensor is its input and that returns one tensor.

    Attributes:
        name: Path of the module.
        module: The module.
        input: What it read. Held, so that no other tensor gets its identity.
        output: What it returned; the input itself if it works in place.
        first: Position of its start among all starts and ends.
        last: Position of its end.
    """

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor
    first: int
    last: int

    @property
    def leaf(self) -> bool:
        """Whether the module has no children."""
        return next(self.module.children(), None) is None


def record_calls(model: nn.Module, forward: Callable[[], Any]) -> list[Call]:
    """Run ``forward`` once in evaluation mode without gradients and list the calls by their start.

    Args:
        model: Whose submodules are watched; modes are as before afterwards.
        forward: Runs the model.
    """
    calls: list[Call] = []
    open_calls: list[int] = []
    clock = 0

    def enter(*_: Any) -> None:
        nonlocal clock
        open_calls.append(clock)
        clock += 1

    def leave(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal clock
            first = open_calls.pop()
            clock += 1
            tensors = [value for value in inputs if isinstance(value, Tensor)]
            if len(tensors) == 1 and isinstance(output, Tensor):
                calls.append(Call(name, module, tensors[0], output, first, clock - 1))

        return note

    handles = []
    for name, module in model.named_modules():
        if module is not model:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave(name))]
    try:
        with evaluating(model), torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return sorted(calls, key=lambda call: call.first)
