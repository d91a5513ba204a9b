"""Loading a checkpoint strictly into a model of any kind."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mdp_mmdet3d.checkpoint.check import plan_hash_of
from mdp_mmdet3d.checkpoint.public_names import to_mmpretrain
from mdp_mmdet3d.checkpoint.read import read_checkpoint
from mdp_mmdet3d.errors import StructureMismatchError
from mdp_mmdet3d.surgery.plan import PruningPlan

logger = logging.getLogger(__name__)


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint into a model with exactly its names and shapes, or with those of torchvision or timm.

    Args:
        model: Dense, or pruned: then the file must carry the same plan.
        path: The checkpoint.

    Raises:
        FileFormatError: See `read_checkpoint`.
        StructureMismatchError: The checkpoint is that of another model or plan.
    """
    own = model.state_dict()
    checkpoint = read_checkpoint(path, own)
    if (plan := getattr(model, "mdp_plan", None)) is not None:
        check_meta(checkpoint["meta"], plan, f"checkpoint {path}")
    state, recognised = to_mmpretrain(checkpoint["state_dict"], own)
    if recognised:
        logger.info("checkpoint %s: recognised as %s, %d names changed to the model's", path, recognised, len(state))
    # Counters that frozen batch norms of other releases lack; nothing is computed with them.
    state |= {key: own[key] for key in own if key.endswith(".num_batches_tracked") and key not in state}
    check_structure(state, own, str(path))
    model.load_state_dict(state, strict=True)


def check_meta(meta: Mapping[str, Any], plan: PruningPlan, name: str = "the checkpoint") -> None:
    """Raise `StructureMismatchError` if a checkpoint's meta carries another plan than ``plan``."""
    stored = plan_hash_of(meta, name)
    if stored is not None and stored != plan.hash:
        raise StructureMismatchError(
            f"{name} was saved with plan {stored}, the config names plan {plan.hash}; "
            "use the plan.json that lies beside the checkpoint"
        )


def check_structure(state: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str, remedy: str = "") -> None:
    """Check that names and shapes of two state dicts are the same.

    Args:
        state: Of the file.
        own: Of the model.
        what: How errors call the file.
        remedy: What else may help, behind "use the config it was trained with".

    Raises:
        StructureMismatchError: They differ; names the first keys with expected and found shapes.
    """
    problems = []
    for key, value in own.items():
        if key not in state:
            problems.append(f"{key} expected {tuple(value.shape)}, not found")
        elif state[key].shape != value.shape:
            problems.append(f"{key} expected {tuple(value.shape)}, found {tuple(state[key].shape)}")
    problems += [f"{key} not expected, found {tuple(v.shape)}" for key, v in state.items() if key not in own]
    if problems:
        shown = "; ".join(problems[:5])
        raise StructureMismatchError(
            f"{what} is of another model, {len(problems)} differences in {len(own)} tensors: {shown}. "
            f"Use the config it was trained with{remedy}"
        )
