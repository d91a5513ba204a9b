"""What the pruning job leaves behind: slim checkpoint and a config that plain MMEngine tools run."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

from mdp_mmdet3d import __version__
from mdp_mmdet3d.engine.plan_hook import META_KEY
from mdp_mmdet3d.files import atomic_path
from mdp_mmdet3d.surgery.plan import PruningPlan


def save_slim_checkpoint(
    path: str | Path, model: nn.Module, plan: PruningPlan, weights: str, class_names: Sequence[str]
) -> None:
    """Write the slim state dict with its plan in the meta; readable with ``weights_only=True``.

    Args:
        path: Target file.
        model: The slim model.
        plan: What was cut.
        weights: Where the dense weights came from.
        class_names: In the order of the score columns; MMDetection3D's ``init_model`` reads them.
    """
    meta = {
        META_KEY: plan.to_dict(),
        "mdp_weights": weights,
        "mdp_version": __version__,
        "dataset_meta": {"classes": list(class_names)},
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    with atomic_path(path) as temporary:
        torch.save({"meta": meta, "state_dict": state}, temporary)


def write_slim_config(
    path: str | Path, config: Config, plan: str = "plan.json", checkpoint: str = "pruned.pth"
) -> None:
    """Write a config of the slim model; plan and checkpoint are looked for beside it.

    Args:
        path: Target ``.py`` file.
        config: The dense config.
        plan: File name of the plan.
        checkpoint: File name of the slim checkpoint.
    """
    content = copy.deepcopy(config.to_dict())
    for key in ("prune", "checkpoint", "work_dir", "resume"):
        content.pop(key, None)
    content["model"] = {"type": "MDPSlimModel", "architecture": content["model"], "plan": "{{ fileDirname }}/" + plan}
    content["load_from"] = "{{ fileDirname }}/" + checkpoint
    imports = list((content.get("custom_imports") or {}).get("imports", ()))
    content["custom_imports"] = {
        "imports": [*dict.fromkeys([*imports, "mdp_mmdet3d.engine"])],
        "allow_failed_imports": False,
    }
    hooks = list(content.get("custom_hooks") or ())
    if not any(hook.get("type") == "PlanHook" for hook in hooks):
        hooks.append({"type": "PlanHook"})
    content["custom_hooks"] = hooks
    with atomic_path(path) as temporary:
        Config(content).dump(temporary)
