"""Repair of a pruned model: what is left is refitted to what the dense model computed, without training."""

from mdp_mmdet3d.surgery.repair.refit import repair
from mdp_mmdet3d.surgery.repair.replay import Frame
from mdp_mmdet3d.surgery.repair.settings import LayerRepair, RepairReport, RepairSettings
from mdp_mmdet3d.surgery.repair.store import RepairStore
from mdp_mmdet3d.surgery.repair.weights import WeightedFrame, query_weights

__all__ = [
    "Frame",
    "LayerRepair",
    "RepairReport",
    "RepairSettings",
    "RepairStore",
    "WeightedFrame",
    "query_weights",
    "repair",
]
