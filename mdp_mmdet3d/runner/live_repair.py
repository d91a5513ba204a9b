"""Repair inside a running training: the weights that a plan leaves are refitted, the live model keeps its shapes."""

from __future__ import annotations

import copy

import torch
from torch import nn

from mdp_mmdet3d.adapters import Adapter
from mdp_mmdet3d.importance.loss_probe import seeded
from mdp_mmdet3d.surgery.apply import apply_plan, keep_masks
from mdp_mmdet3d.surgery.plan import PruningPlan
from mdp_mmdet3d.surgery.repair import RepairReport, RepairSettings, repair


@torch.no_grad()
def repair_live(live: nn.Module, plan: PruningPlan, adapter: Adapter, settings: RepairSettings) -> RepairReport:
    """Refit what ``plan`` leaves of a model that goes on training to what the model computes now.

    Random numbers of the training are not used. With several processes, all call it.

    Args:
        live: Unwrapped, not yet masked by this plan; only the weights that stay change, in place.
        plan: What stays.
        adapter: Gives the calibration frames.
        settings: How.

    Raises:
        MdpError: There are no frames, or a value is not finite; ``live`` is as it was.
    """
    dense = copy.deepcopy(live).eval()
    for parameter in dense.parameters():
        parameter.grad = None
    pruned = apply_plan(copy.deepcopy(dense), plan)
    shape = adapter.shape
    with seeded(0):
        count = settings.count(shape.num_cams * shape.height * shape.width)
        frames = adapter.calibration_frames(dense, count, settings.stride)
        report = repair(dense, pruned, plan, frames, settings)
    spread(pruned, live, plan)
    return report


@torch.no_grad()
def spread(pruned: nn.Module, dense: nn.Module, plan: PruningPlan) -> None:
    """Write the tensors of a pruned model to where they were cut from; the rest of ``dense`` stays."""
    masks = keep_masks(dense, plan)
    tensors = dict((*dense.named_parameters(), *dense.named_buffers()))
    for name, values in (*pruned.named_parameters(), *pruned.named_buffers()):  # shared modules by their first name
        target = tensors[name]
        kept = [
            masks.get(name, {}).get(axis, torch.ones(size, dtype=torch.bool)).nonzero().flatten().to(target.device)
            for axis, size in enumerate(target.shape)
        ]
        if kept:
            target[torch.meshgrid(*kept, indexing="ij")] = values.to(target)
        else:
            target.copy_(values)
