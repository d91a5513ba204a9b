"""Structures to measure whole, for the fit of the latency model."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from mdp_mmdet3d.space import PruningSpace


@dataclass(frozen=True)
class Structure:
    """What stays of a model, without saying which elements.

    Attributes:
        widths: Kept count per dimension.
        removed: Removed blocks; a block inside a removed one is not listed.
    """

    widths: Mapping[str, int]
    removed: frozenset[str]


def dense_structure(space: PruningSpace) -> Structure:
    """Everything stays."""
    return Structure({d.name: d.size for d in space.dimensions}, frozenset())


def smallest_structure(space: PruningSpace) -> Structure:
    """Every removable block is removed and every dimension has its smallest count."""
    return Structure(
        {d.name: d.options[0] for d in space.dimensions}, _outermost(space, {b.name for b in space.blocks})
    )


def random_structure(space: PruningSpace, seed: int, *, skew: bool = False) -> Structure:
    """A structure drawn at random, the same for equal seeds.

    Args:
        space: What may be pruned.
        seed: Seed.
        skew: Draw one keep ratio in 0.1-1 per module (the first two parts of a path) and one share of removed blocks,
            instead of each option for itself: such structures tell good latency models from bad ones.
    """
    generator = random.Random(seed)
    ratios: dict[str, float] = {}
    widths = {}
    for dimension in space.dimensions:
        if skew:
            module = ".".join(dimension.name.split(".")[:2])
            ratio = ratios.setdefault(module, generator.uniform(0.1, 1.0)) * generator.uniform(0.5, 1.5)
            widths[dimension.name] = min(dimension.options, key=lambda n: abs(n - ratio * dimension.size))
        else:
            widths[dimension.name] = generator.choice(dimension.options)
    share = generator.uniform(0.0, 0.7) if skew else 0.15
    return Structure(widths, _outermost(space, {b.name for b in space.blocks if generator.random() < share}))


def fit_structures(space: PruningSpace, count: int = 5, seed: int = 0) -> list[Structure]:
    """The dense and the smallest structure, and skewed random ones, ``count`` in all (at least 2)."""
    if count < 2:
        raise ValueError(f"count is {count}: the dense and the smallest structure are always needed")
    others = [random_structure(space, seed + index, skew=True) for index in range(count - 2)]
    return [dense_structure(space), smallest_structure(space), *others]


def _outermost(space: PruningSpace, removed: set[str]) -> frozenset[str]:
    return frozenset(name for name in removed if removed.isdisjoint(space.chain(name)[1:]))
