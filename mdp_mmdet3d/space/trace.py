"""Find the pruning space of a model: dispatch to the adapter of its architecture."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.space.builder import SpaceBuilder, SpaceOptions
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.apply import fingerprint


@dataclass(frozen=True)
class InputShape:
    """Shape of one frame at deployment.

    Attributes:
        num_cams: Camera images N.
        height: Pixels of the network image.
        width: Pixels of the network image.
    """

    num_cams: int
    height: int
    width: int


Adapter = Callable[[SpaceBuilder, nn.Module, InputShape], None]
_ADAPTERS: dict[str, Adapter] = {}


def register_adapter(model_class: str) -> Callable[[Adapter], Adapter]:
    """Decorator: the function fills a `SpaceBuilder` for models of this class name."""

    def register(adapter: Adapter) -> Adapter:
        _ADAPTERS[model_class] = adapter
        return adapter

    return register


def trace_space(model: nn.Module, input_shape: InputShape, options: SpaceOptions | None = None) -> PruningSpace:
    """Find what may be pruned in a dense model.

    Args:
        model: The dense detector; left as it was.
        input_shape: One frame at deployment; fixes what operators cost.
        options: How finely and deeply may be pruned.

    Raises:
        MdpError: No adapter is registered for the model's class, or a freeze pattern matches nothing.
    """
    name = type(model).__name__
    if name not in _ADAPTERS:
        raise MdpError(
            f"no pruning adapter for {name!r}; known: {', '.join(sorted(_ADAPTERS)) or 'none'}. "
            "See docs/how-to/new-architecture.md"
        )
    builder = SpaceBuilder(model, options or SpaceOptions())
    level = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)  # torch-pruning warns about parameters that it does not handle
        _ADAPTERS[name](builder, model, input_shape)
    finally:
        logging.disable(level)
    known = [*builder.dimensions, *builder.blocks, *builder.left_alone]
    for pattern in builder.options.freeze:
        if not any(SpaceOptions(freeze=(pattern,)).matches(item) for item in known):
            raise MdpError(
                f"prune.freeze pattern {pattern!r} matches no dimension and no block of {name}; "
                f"names look like {known[0]!r} and {known[-1]!r}"
            )
    return builder.finish(name, fingerprint(model))
