"""The only place that imports MMEngine: registered slim model, hooks, the pruning job.

Importing it (``custom_imports = dict(imports=["mdp_mmdet3d.engine"])``) registers `MDPSlimModel` and `PlanHook`.
"""
from mdp_mmdet3d.engine.plan_hook import PlanHook
from mdp_mmdet3d.engine.safe_loading import register_safe_globals
from mdp_mmdet3d.engine.slim_model import MDPSlimModel

register_safe_globals()

__all__ = ["MDPSlimModel", "PlanHook", "register_safe_globals"]
