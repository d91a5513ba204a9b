"""Checkpoints of a slim model carry its plan, and are refused where the plan differs."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mdp_mmdet3d.errors import StructureMismatchError
from mdp_mmdet3d.surgery.plan import PruningPlan

META_KEY = "mdp_plan"


def plan_of(model: Any) -> PruningPlan | None:
    """Plan of a slim model, also behind DDP; None for a dense one."""
    return getattr(model.module if is_model_wrapper(model) else model, "mdp_plan", None)


def check_meta(meta: dict[str, Any], plan: PruningPlan) -> None:
    """Raise `StructureMismatchError` if a checkpoint's meta carries another plan than ``plan``."""
    stored = meta.get(META_KEY)
    if stored is not None and stored.get("hash") != plan.hash:
        raise StructureMismatchError(
            f"the checkpoint was saved with plan {stored.get('hash')}, the config names plan {plan.hash}; "
            "use the plan.json that lies beside the checkpoint"
        )


@HOOKS.register_module()
class PlanHook(Hook):
    """Write the plan into every checkpoint's meta and check it when one is loaded."""

    priority = "VERY_HIGH"

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add plan and hash."""
        plan = plan_of(runner.model)
        if plan is not None:
            checkpoint.setdefault("meta", {})[META_KEY] = plan.to_dict()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse a checkpoint that was saved with another plan."""
        plan = plan_of(runner.model)
        if plan is not None:
            check_meta(checkpoint.get("meta") or {}, plan)
