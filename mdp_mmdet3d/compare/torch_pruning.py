"""The library torch-pruning as a method: what its pruner cuts, as a plan."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mdp_mmdet3d.adapters import Adapter, SingleGraph
from mdp_mmdet3d.adapters.single_graph_export import TensorMode
from mdp_mmdet3d.compare.tuning import NoPlanError
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.extras import needs
from mdp_mmdet3d.space.types import Dimension, PruningSpace
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.plan import PruningPlan

LARGEST_RATIO = 0.98


def torch_pruning_plan(
    adapter: Adapter, dense: nn.Module, space: PruningSpace, ratio: float, multiple: int
) -> PruningPlan:
    """What torch-pruning's group pruner leaves of a model: L2 group norms, ranked among isomorphic groups.

    Isomorphic Pruning (Fang et al., ECCV 2024) on DepGraph (CVPR 2023), with the library's own scores, ranking and
    rounding. It may cut what ``space`` offers, to any count, and removes no blocks. The plan is checked: cut by this
    package, every tensor has the shape that the library gave it.

    Args:
        adapter: Of a model that is one graph on images.
        dense: The dense model.
        space: What may be pruned.
        ratio: Share of the channels to prune.
        multiple: Counts are rounded to it.

    Raises:
        MissingExtraError: The library is not installed.
        MdpError: The model is no single graph.
        NoPlanError: The library fails on it, or cuts what the space cannot express.
    """
    with needs("all", "the method torch-pruning"):
        import torch_pruning as tp
    if not isinstance(adapter, SingleGraph):
        raise MdpError(
            f"the method torch-pruning traces one graph on images, which {type(dense).__name__} is not; leave it out"
        )
    model = copy.deepcopy(dense)
    size = (adapter.shape.height, adapter.shape.width)
    cams = adapter.shape.num_cams
    image = torch.zeros((1, 3, *size) if cams == 1 else (1, cams, 3, *size))
    rows = {m.tensor: d for d in space.dimensions for m in d.members if m.axis == 0}
    names = {module: name for name, module in model.named_modules()}
    layers = [module for module in names if isinstance(module, (nn.Conv2d, nn.Linear))]
    for module in names:  # the tracer follows gradients, and mmdet's backbones freeze stages whenever they are asked to
        if isinstance(getattr(module, "frozen_stages", None), int):
            module.frozen_stages = -1
        if getattr(module, "with_cp", False):
            module.with_cp = False
    model.requires_grad_(True)
    kept = {f"{names[module]}.weight": list(range(module.weight.shape[0])) for module in layers}
    try:
        pruner = tp.pruner.BasePruner(
            TensorMode(model, size),
            image,
            tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            isomorphic=True,
            pruning_ratio=min(max(ratio, 0.0), LARGEST_RATIO),
            max_pruning_ratio=LARGEST_RATIO,
            round_to=multiple,
            ignored_layers=[module for module in layers if f"{names[module]}.weight" not in rows],
        )
        for group in pruner.step(interactive=True):
            for item in group:
                name = f"{names.get(item.dep.target.module, '')}.weight"
                if name in kept and pruner.DG.is_out_channel_pruning_fn(item.dep.handler):
                    gone = set(item.idxs)
                    kept[name] = [channel for place, channel in enumerate(kept[name]) if place not in gone]
            group.prune()
    except Exception as error:  # whatever the library raises within itself
        raise NoPlanError(f"torch-pruning fails on {type(dense).__name__}: {type(error).__name__}: {error}") from error
    plan = _plan(space, kept)
    _check_shapes(apply_plan(copy.deepcopy(dense), plan), model)
    return plan


def _plan(space: PruningSpace, kept: Mapping[str, list[int]]) -> PruningPlan:
    """The plan that keeps these rows (output channels) of the layers' weights."""
    elements = {d.name: (found,) for d in space.dimensions if (found := _elements(d, kept)) is not None}
    any_count = tuple(replace(d, options=tuple(range(1, d.size + 1))) for d in space.dimensions)
    return PruningPlan.from_kept(replace(space, dimensions=any_count), elements, set())


def _elements(dimension: Dimension, kept: Mapping[str, list[int]]) -> tuple[int, ...] | None:
    """Elements whose rows are all kept; None where no layer makes them or they have copies."""
    member = next((m for m in dimension.members if m.axis == 0 and m.tensor in kept), None)
    if member is None or dimension.copies > 1:
        return None
    rows = set(kept[member.tensor])
    first, width = member.offset, member.width
    return tuple(e for e in range(dimension.size) if rows.issuperset(range(first + e * width, first + (e + 1) * width)))


def _check_shapes(ours: nn.Module, theirs: nn.Module) -> None:
    expected: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    for name, tensor in ours.state_dict().items():
        if tuple(tensor.shape) != expected[name]:
            raise NoPlanError(
                f"torch-pruning cuts {name} to {expected[name]}, which this pruning space cannot express (it gives "
                f"{tuple(tensor.shape)})"
            )
