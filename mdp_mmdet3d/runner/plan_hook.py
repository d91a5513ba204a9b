"""Checkpoints of a pruned model carry its plan, and are refused where the plan differs."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mdp_mmdet3d.checkpoint.check import META_KEY, after_schedule, check_resume, check_schedule, check_start, meta_of
from mdp_mmdet3d.checkpoint.load import check_meta
from mdp_mmdet3d.checkpoint.weights import check_finite, find_weights
from mdp_mmdet3d.surgery.plan import PruningPlan


def plan_of(model: Any) -> PruningPlan | None:
    """Plan of a pruned model, also behind DDP; None for a dense one."""
    return getattr(model.module if is_model_wrapper(model) else model, "mdp_plan", None)


@HOOKS.register_module()
class PlanHook(Hook):
    """Write the plan into every checkpoint's meta; check what is loaded, before MMEngine loads what happens to fit.

    ``tools/train.py`` gives it to trainings of dense models too.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner: Runner) -> None:
        """Warn of a training that is longer than its schedule."""
        steps = {True: runner.max_epochs, False: runner.max_iters}
        if (rest := after_schedule(runner.param_schedulers, steps)) is not None:
            runner.logger.warning(rest)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add plan and hash."""
        plan = plan_of(runner.model)
        if plan is not None:
            checkpoint.setdefault("meta", {})[META_KEY] = plan.to_dict()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse a checkpoint that was saved with another plan, of another model or, to go on with, without its state.

        Raises:
            StructureMismatchError, FileFormatError: See `check_meta`, `check_start`, `check_resume`, `check_schedule`
                and `find_weights`.
        """
        name = f"checkpoint {runner._load_from}" if runner._load_from else "the checkpoint"
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        plan = plan_of(model)
        if plan is not None:
            check_meta(meta_of(checkpoint, name), plan, name)
        if runner._resume:
            check_resume(checkpoint, model, name)
            check_schedule(checkpoint, runner.param_schedulers, name)
            check_finite(checkpoint["state_dict"], name)
            return
        found = find_weights(checkpoint, name, model.state_dict())
        for note in found.notes:
            runner.logger.info(f"{name}: {note}")
        checkpoint["state_dict"] = found.state
        if plan is None:
            check_start(checkpoint, model, name)


def add_plan_hook(config: Config) -> None:
    """Give a training a `PlanHook`, in place, unless it has one."""
    hooks = list(config.get("custom_hooks") or ())
    if not any(hook.get("type") == PlanHook.__name__ for hook in hooks):
        config.custom_hooks = [*hooks, {"type": PlanHook.__name__}]
