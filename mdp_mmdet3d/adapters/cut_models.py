"""Models with other widths, by which it is seen what depends on which dimension."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.apply import apply_plan, model_digest, shared_copy
from mdp_mmdet3d.surgery.plan import Cut, PruningPlan

RUNS = 3


@dataclass(frozen=True)
class CutModels:
    """Models with other widths.

    Attributes:
        counts: Elements of each dimension in each.
        models: The models; none where there is no dimension.
    """

    counts: tuple[dict[str, int], ...]
    models: tuple[nn.Module, ...]

    @classmethod
    def of(cls, builder: SpaceBuilder, model: nn.Module) -> CutModels:
        """Some of a dense model, with counts by which the builder's dimensions can be told apart."""
        space = builder.snapshot(model_digest(model))
        if not space.dimensions:
            return cls((), ())
        counts = _distinct_counts(space)
        models = []
        for chosen in counts:
            cuts = {
                d.name: Cut(d.kind, d.size, (tuple(range(chosen[d.name])),) * d.copies, d.members)
                for d in space.dimensions
            }
            models.append(apply_plan(shared_copy(model), PruningPlan(space.model_digest, cuts, {})))
        return cls(tuple(counts), tuple(models))


def _distinct_counts(space: PruningSpace) -> list[dict[str, int]]:
    """Counts for each run such that dimensions differ in at least one of them, as far as their sizes allow."""
    rng = np.random.default_rng(0)
    counts: list[dict[str, int]] = [{} for _ in range(RUNS)]
    taken: set[tuple[int, ...]] = set()
    for dimension in space.dimensions:
        for _ in range(100):
            drawn = tuple(int(rng.integers((dimension.size + 1) // 2, dimension.size)) for _ in range(RUNS))
            if drawn not in taken:
                break
        taken.add(drawn)
        for chosen, count in zip(counts, drawn, strict=True):
            chosen[dimension.name] = count
    return counts
