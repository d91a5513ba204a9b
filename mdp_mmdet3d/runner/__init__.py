"""The only place that imports MMEngine: registered pruned model, hooks, the pruning job.

Importing it (``custom_imports = dict(imports=["mdp_mmdet3d.runner"])``) registers `MDPPrunedModel` and the
hooks.
"""

from mdp_mmdet3d.checkpoint.safe_loading import register_safe_globals
from mdp_mmdet3d.runner.finite_optim import FiniteOptimWrapper
from mdp_mmdet3d.runner.importance_hook import ImportanceHook
from mdp_mmdet3d.runner.plan_hook import PlanHook
from mdp_mmdet3d.runner.plan_logger_hook import PlanLoggerHook
from mdp_mmdet3d.runner.prune_hook import MDPPruneHook
from mdp_mmdet3d.runner.pruned_model import MDPPrunedModel

register_safe_globals()

__all__ = [
    "FiniteOptimWrapper",
    "ImportanceHook",
    "MDPPruneHook",
    "MDPPrunedModel",
    "PlanHook",
    "PlanLoggerHook",
    "register_safe_globals",
]
