"""Weight norms in place of first-order importance: what is small is worth little, whatever the data says."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.space.types import Dimension, PruningSpace


def magnitude_importance(model: nn.Module, space: PruningSpace, weights: str) -> ImportanceTable:
    """L2 norm of the weights that make up each element, as a table that the program takes like any other.

    An element is its whole group, rows of the layers that write it and columns of those that read it, as in DepGraph
    (Fang et al., CVPR 2023, section 3.3). The norms of a dimension are divided by their mean, since layers of unequal
    size cannot be compared otherwise; a dimension that several blocks share is worth the same in each.

    Args:
        model: The dense model that ``space`` was traced from.
        space: Names what is scored.
        weights: Their identity.
    """
    parameters = dict(model.named_parameters())
    scores: dict[str, dict[str | None, np.ndarray]] = {}
    for dimension in space.dimensions:
        blocks = list(dict.fromkeys(source.block for source in dimension.sources))
        norms = _norms(dimension, parameters)
        scores[dimension.name] = {block: norms / len(blocks) for block in blocks}
    return ImportanceTable(space.model_digest, weights, 1, 0, 1, scores, "L2 norms")


def _norms(dimension: Dimension, parameters: dict[str, nn.Parameter]) -> np.ndarray:
    """Norm of every element relative to the mean one, (copies, size)."""
    squares = torch.zeros(dimension.copies, dimension.size, dtype=torch.float64)
    for member in dimension.members:
        if member.tensor not in parameters:  # statistics of batch norms are no weights
            continue
        tensor = parameters[member.tensor].detach().double().square().movedim(member.axis, 0)
        length = dimension.copies * dimension.size * member.width
        part = tensor.reshape(len(tensor), -1).sum(dim=1)[member.offset : member.offset + length]
        squares += part.reshape(dimension.copies, dimension.size, member.width).sum(dim=2)
    norms = squares.sqrt().numpy()
    return norms / norms.mean() if norms.any() else norms + 1.0
