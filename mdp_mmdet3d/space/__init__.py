"""WHAT may be pruned: dimensions, blocks and cost terms of a model.

This module holds plain data only; `mdp_mmdet3d.space.trace` finds it in a torch model.
"""

from mdp_mmdet3d.operators import OperatorSignature
from mdp_mmdet3d.space.types import (
    Block,
    BlockKind,
    CostTerm,
    Dimension,
    DimensionKind,
    NotPrunable,
    PruningSpace,
    ScoreSource,
    TensorAxis,
)

__all__ = [
    "Block",
    "BlockKind",
    "CostTerm",
    "Dimension",
    "DimensionKind",
    "NotPrunable",
    "OperatorSignature",
    "PruningSpace",
    "ScoreSource",
    "TensorAxis",
]
