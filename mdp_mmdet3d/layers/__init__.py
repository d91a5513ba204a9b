"""Layers whose widths are constructor arguments, and what stands where a block was removed; parameters keep names."""

from mdp_mmdet3d.layers.attention import SeparateAttention, TorchAttention
from mdp_mmdet3d.layers.packed_attention import PackedSelfAttention, WindowAttention, widened
from mdp_mmdet3d.layers.removed import RemovedBranch, RemovedSubLayer

__all__ = [
    "PackedSelfAttention",
    "RemovedBranch",
    "RemovedSubLayer",
    "SeparateAttention",
    "TorchAttention",
    "WindowAttention",
    "widened",
]
