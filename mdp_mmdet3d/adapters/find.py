"""Which adapter a model has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mdp_mmdet3d.adapters.base import HOW_TO, Adapter, registered_adapters
from mdp_mmdet3d.adapters.single_graph import SingleGraph
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.space.builder import InputShape, SpaceOptions
from mdp_mmdet3d.space.types import PruningSpace

PRUNED_TYPES = ("MDPPrunedModel", "MDPSlimModel")
"""What a config calls a pruned model (`runner.pruned_model`); the second is that of version-1 configs."""


def adapter_of(config: Config, shape: InputShape, section: Mapping[str, Any] | None = None) -> Adapter:
    """The adapter of a config's model.

    Args:
        config: With ``model``, which may be a pruned one.
        shape: One frame at deployment.
        section: ``prune.adapter``: a type and further arguments; None looks for one by the model's class.

    Raises:
        MdpError: The type is not known, or its arguments do not fit.
    """
    if section is None:
        return _adapter_class(_class_of(config))(config, shape)
    options = dict(section)
    name = options.pop("type", None)
    found = {adapter.__name__: adapter for adapter in registered_adapters()}.get(name)
    if found is None:
        known = ", ".join(adapter.__name__ for adapter in registered_adapters())
        raise MdpError(
            f"prune.adapter type {name!r} is not registered; known: {known}. Is the module that registers it in "
            f"custom_imports? See {HOW_TO}"
        )
    try:
        return found(config, shape, **options)
    except TypeError as error:
        raise MdpError(f"prune.adapter: {error}; see {HOW_TO}") from error


def trace_space(model: nn.Module, shape: InputShape, options: SpaceOptions | None = None) -> PruningSpace:
    """Find what may be pruned in a dense model, with the adapter of its class.

    Args:
        model: The dense model; left as it was.
        shape: One frame at deployment; fixes what operators cost.
        options: How finely and deeply may be pruned.

    Raises:
        MdpError: The model cannot be traced, or a freeze pattern matches nothing.
    """
    return _adapter_class(type(model))(Config(), shape).trace(model, options)


def _adapter_class(model: type) -> type[Adapter]:
    names = [base.__name__ for base in model.__mro__]
    for adapter in registered_adapters():
        if any(name in adapter.models for name in names):
            return adapter
    return SingleGraph


def _class_of(config: Config) -> type:
    section = config.get("model")
    if not isinstance(section, Mapping) or "type" not in section:
        raise MdpError("the config has no model section with a type")
    while section["type"] in PRUNED_TYPES:  # a pruned model may have been pruned again
        section = section["architecture"]
    kind = section["type"]
    if isinstance(kind, type):
        return kind
    init_default_scope(config.get("default_scope", "mmdet3d"))
    with MODELS.switch_scope_and_registry(None) as registry:
        found = registry.get(kind)
    if not isinstance(found, type):
        raise MdpError(
            f"model type {kind!r} is not registered; is the module that registers it in custom_imports, and is "
            "default_scope the model's?"
        )
    return found
