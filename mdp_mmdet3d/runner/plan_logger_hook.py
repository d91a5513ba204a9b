"""What a pruning plan looks like, in MMEngine's visualizers (TensorBoard and the like)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mdp_mmdet3d.runner.plan_hook import plan_of
from mdp_mmdet3d.runner.prune_hook import PLAN_INFO
from mdp_mmdet3d.surgery.plan import PruningPlan


def plan_scalars(plan: PruningPlan) -> dict[str, float]:
    """Figures of a plan by name: latencies in milliseconds, number of removed blocks, kept share per dimension."""
    scalars = {f"mdp/{key}": float(plan.info[key]) for key in ("budget_ms", "predicted_ms") if key in plan.info}
    scalars["mdp/removed_blocks"] = float(len(plan.removed))
    scalars["mdp/narrowed_dimensions"] = float(len(plan.cuts))
    return scalars | {f"mdp/kept/{name}": cut.count / cut.size for name, cut in plan.cuts.items()}


@HOOKS.register_module()
class PlanLoggerHook(Hook):
    """Log the plan of a pruned model at the start, and every plan that `MDPPruneHook` makes when it makes it."""

    priority = "LOW"  # behind MDPPruneHook

    def __init__(self) -> None:
        self._logged: str | None = None

    def before_train(self, runner: Runner) -> None:
        """Log a plan that is there from the start."""
        plan = plan_of(runner.model)
        if plan is not None:
            self._log(runner, plan)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Log a new plan."""
        content: Mapping[str, Any] | None = runner.message_hub.runtime_info.get(PLAN_INFO)
        if content is not None and content["hash"] != self._logged:
            self._log(runner, PruningPlan.from_dict(content))

    def _log(self, runner: Runner, plan: PruningPlan) -> None:
        self._logged = plan.hash
        runner.visualizer.add_scalars(plan_scalars(plan), step=runner.iter + 1)
