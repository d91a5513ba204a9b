"""A pruned model from a config: the dense architecture, cut by a plan before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import nn

from mdp_mmdet3d.adapters.find import PRUNED_TYPES
from mdp_mmdet3d.checkpoint.check import check_pruned_state
from mdp_mmdet3d.config_file import without_pretrained
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.plan import PruningPlan


@MODELS.register_module(name=list(PRUNED_TYPES))
def MDPPrunedModel(architecture: dict, plan: str | Path | dict, backbone: Any = None, **inherited: Any) -> nn.Module:
    """Build ``architecture`` and cut ``plan`` out of it; register name for ``model=dict(type="MDPPrunedModel", ...)``.

    The result is an ordinary model of the dense class, with the same state-dict names and narrower tensors: every
    MMEngine tool, DDP, EMA and the optimizer see pruned parameters from the start. It accepts only checkpoints whose
    names and shapes are its own: MMEngine's loading would merely log a mismatch.

    Args:
        architecture: Config of the dense model. Pretrained initialisations in it are ignored: they have dense shapes.
        plan: Plan file, or its content.
        backbone: Not used: MMDetection's ``init_detector`` looks into ``model.backbone`` of every config.
        **inherited: What MMEngine and MMDetection3D add to a model config (``data_preprocessor``,
            ``train_cfg``): passed on to the architecture unless it is None.

    Raises:
        FileFormatError: The plan cannot be read.
        StructureMismatchError: It was made for another model.
    """
    content = read_plan(plan)
    config = without_pretrained(architecture)
    for key, value in inherited.items():
        if value is not None:
            config.setdefault(key, value)
    model = apply_plan(MODELS.build(config), content)
    model.mdp_plan = content
    return load_strictly(model)


def read_plan(plan: str | Path | Mapping[str, Any]) -> PruningPlan:
    """The plan that a config names or holds."""
    return PruningPlan.from_dict(plan) if isinstance(plan, Mapping) else PruningPlan.load(plan)


def load_strictly(model: nn.Module) -> nn.Module:
    """Make ``model`` refuse state dicts whose names or shapes are not exactly its own.

    Raises (when a state dict is loaded):
        StructureMismatchError: Names the first differing keys with expected and found shapes.
    """
    model.register_load_state_dict_pre_hook(_check_state)
    return model


def _check_state(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    found = {
        name.removeprefix(prefix): tuple(value.shape)
        for name, value in state.items()
        if name.startswith(prefix) and isinstance(value, torch.Tensor)
    }
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    check_pruned_state(expected, found)
