"""Values in units of loss, and repair, inside a running training: the live model keeps its shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mdp_mmdet3d.adapters import Adapter
from mdp_mmdet3d.files import digest
from mdp_mmdet3d.importance.loss_probe import seeded
from mdp_mmdet3d.runner.loss_search import find_loss_search
from mdp_mmdet3d.runner.optimise import PlanSearch
from mdp_mmdet3d.runner.settings import LossSettings
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
    dense = _as_it_is(live)
    pruned, report = _repaired(dense, plan, adapter, settings)
    spread(pruned, live, plan)
    return report


def find_live_plan(
    live: nn.Module,
    search: PlanSearch,
    adapter: Adapter,
    settings: LossSettings,
    folder: Path,
    weights: str,
    say: Callable[[str], None],
    repairing: RepairSettings | None = None,
) -> PruningPlan:
    """Best plan by values in units of loss, measured on a model that goes on training; `live` is not changed.

    Args:
        live: Unwrapped.
        search: For the budget at hand, with the importance of ``live``.
        adapter: Gives the frames and their loss.
        settings: How to measure.
        folder: What was measured is kept there.
        weights: Identity of the weights at this moment.
        say: Receives lines for people.
        repairing: How candidates are repaired before they are compared; None: not at all.

    Raises:
        MdpError: There are too few frames, or a loss is not finite.
        InfeasibleBudgetError: No structure meets the budget.
    """
    dense = _as_it_is(live)
    with seeded(0):
        loss = find_loss_search(adapter, dense, search.space, search.importance, weights, settings, folder, say)
        if repairing is not None:
            loss.repaired = lambda plan: _repaired(dense, plan, adapter, repairing)[0]
            loss.repaired_as = digest(repairing.identity)
        return loss.solve(search)


def _as_it_is(live: nn.Module) -> nn.Module:
    dense = copy.deepcopy(live).eval()
    for parameter in dense.parameters():
        parameter.grad = None
    return dense


@torch.no_grad()
def _repaired(
    dense: nn.Module, plan: PruningPlan, adapter: Adapter, settings: RepairSettings
) -> tuple[nn.Module, RepairReport]:
    pruned = apply_plan(copy.deepcopy(dense), plan)
    shape = adapter.shape
    with seeded(0):
        count = settings.count(shape.num_cams * shape.height * shape.width)
        frames = adapter.calibration_frames(dense, count, settings.stride)
        return pruned, repair(dense, pruned, plan, frames, settings)


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
