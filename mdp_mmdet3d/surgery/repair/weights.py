"""What a prediction counts in the fits of repair: a detector's queries are mostly background."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mdp_mmdet3d.surgery.repair.replay import Frame

BACKGROUND = 0.02
"""What a query without an object counts. A fit to all queries alike makes those with one worse."""


def query_weights(probabilities: Tensor) -> Tensor:
    """What each query counts: the dense model's best class probability in it, and `BACKGROUND`.

    Args:
        probabilities: (..., n, classes) without one of "no object".

    Returns:
        (..., n).
    """
    return probabilities.amax(dim=-1) + BACKGROUND


@dataclass(frozen=True)
class WeightedFrame:
    """A frame whose predictions do not all count alike.

    Attributes:
        frame: Runs it.
        weights: A number above 0 per prediction. Layers with a row per prediction are fitted with them.
    """

    frame: Frame
    weights: Tensor

    def __call__(self, model: nn.Module) -> Any:
        """Run the frame."""
        return self.frame(model)
