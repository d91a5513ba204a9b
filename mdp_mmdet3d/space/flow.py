"""Which channels of which tensors go together: followed through every operator of one forward pass.

Two indices along axes of tensors are *tied* if one cannot be cut without the other. What an operator does to the order
of its channels is known for those of `flow_rules`; others mark what they read, and what is marked is not cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from mdp_mmdet3d.layers.evaluation import evaluating
from mdp_mmdet3d.layers.fused import without_fused_layers
from mdp_mmdet3d.space.flow_rules import TiedIndices
from mdp_mmdet3d.space.types import OUTPUT

Place = tuple[str, int]  # a tensor of the model, or `OUTPUT` of a module, and one of its axes


@dataclass(frozen=True)
class Flow:
    """What was followed.

    Attributes:
        labels: Per place, which element each index belongs to; equal numbers are tied.
        marks: Per element, why it is not understood.
        shared: Tensors that several modules hold.
    """

    labels: dict[Place, np.ndarray]
    marks: dict[int, str]
    shared: frozenset[str]


def follow_channels(model: nn.Module, forward: Callable[[], Any], ties: Sequence[tuple[Place, Place]] = ()) -> Flow:
    """Run ``forward`` once in evaluation mode without gradients and follow the channels.

    Args:
        model: Whose tensors are followed; modes are as before afterwards.
        forward: Runs the model.
        ties: Axes of the model's tensors that shall go together besides.
    """
    follower = _Follower()
    handles = []
    for name, module in model.named_modules():
        if is_plain_norm(module):
            handles.append(module.register_forward_pre_hook(follower.enter_norm))
            handles.append(module.register_forward_hook(follower.leave_norm(name)))
        elif name and next(module.parameters(), None) is None:
            handles.append(module.register_forward_hook(follower.leave(name), with_kwargs=True))
    try:
        with evaluating(model), torch.no_grad(), without_fused_layers(), follower:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    for one, other in ties:
        follower.tie(model.get_parameter(one[0]), one[1], model.get_parameter(other[0]), other[1])
    return follower.flow(model)


def is_plain_norm(module: nn.Module) -> bool:
    """Whether it is a layer norm over one axis without weight and bias."""
    return isinstance(module, nn.LayerNorm) and module.weight is None and len(module.normalized_shape) == 1


class _Follower(TiedIndices):
    """`TiedIndices` with the names of the model's tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._outputs: dict[str, Tensor] = {}

    def leave(self, name: str) -> Callable[..., None]:
        """A hook that begins anew behind a module without weights that returns the same whatever it reads."""

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim < 2:
                return
            with _disable_current_modes(), torch.no_grad():
                if _is_constant(module, args, kwargs, output):
                    self.starts.pop(output, None)
                    self._outputs[name] = output

        return note

    def enter_norm(self, *_: Any) -> None:
        """A hook: what follows is the operator of a norm without weights."""
        self.in_norm = True

    def leave_norm(self, name: str) -> Callable[..., None]:
        """A hook that names the output of a norm without weights: what it normalises over can be changed."""

        def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.in_norm = False
            self._outputs[name] = output

        return note

    def flow(self, model: nn.Module) -> Flow:
        """What was followed, with the tensors of ``model`` by name."""
        ends = [np.concatenate(side) if self.edges else np.zeros(0, int) for side in zip(*self.edges)] or [
            np.zeros(0, int)
        ] * 2
        graph = coo_matrix((np.ones(len(ends[0]), dtype=bool), (ends[0], ends[1])), shape=(self.count, self.count))
        _, labels = connected_components(graph, directed=False)
        places: dict[Place, np.ndarray] = {}
        names: dict[int, str] = {}
        shared = set()
        held = [
            (f"{path}.{leaf}" if path else leaf, tensor)
            for path, module in model.named_modules()  # one that is used under several names comes once
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        ]
        for name, tensor in (*held, *((f"{n}{OUTPUT}", t) for n, t in self._outputs.items())):
            if id(tensor) in names:
                shared |= {name, names[id(tensor)]}
            names.setdefault(id(tensor), name)
            for axis, start in enumerate(self.starts.get(tensor, ())):
                places[name, axis] = labels[start : start + tensor.shape[axis]]
        marks: dict[int, str] = {}
        for nodes, reason in self.marks:
            for label in np.unique(labels[nodes]):
                marks.setdefault(int(label), reason)
        return Flow(places, marks, frozenset(shared))


def _is_constant(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> bool:
    """Whether a module returns the same for other numbers of the same shapes."""
    generator = torch.Generator().manual_seed(0)

    def other(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return torch.randn(value.shape, generator=generator).to(value)
        return value

    try:
        found = module.forward(*map(other, args), **{key: other(value) for key, value in kwargs.items()})
    except Exception:  # whatever a foreign module raises on noise, it is no constant
        return False
    return isinstance(found, Tensor) and bool(output.any()) and torch.equal(found, output)
