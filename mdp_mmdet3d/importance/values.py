"""Values in units of loss: from the loss change of single cuts to the value terms of the program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mdp_mmdet3d.space.types import Dimension, PruningSpace

LEAST_PIECES = 4
"""Fewer pieces of streams have no spread to speak of."""


@dataclass(frozen=True)
class LossChange:
    """What one cut does to the loss.

    Attributes:
        mean: Over the frames.
        error: Standard error of the mean.
    """

    mean: float
    error: float = 0.0

    @classmethod
    def of(cls, changes: np.ndarray, pieces: np.ndarray | None = None) -> LossChange:
        """Of the change per frame, (frames,); ``pieces`` as for `standard_error`."""
        return cls(float(changes.mean()), standard_error(changes, pieces))


def standard_error(changes: np.ndarray, pieces: np.ndarray | None = None) -> float:
    """Of the mean of (frames,) changes.

    Args:
        changes: Per frame.
        pieces: (frames,) piece of a stream that each frame is of. Frames of one piece are alike: 32 of four scenes are
            four observations. With fewer than `LEAST_PIECES`, or None, frames count by themselves.
    """
    if pieces is not None:
        means = [changes[pieces == piece].mean() for piece in np.unique(pieces)]
        if len(means) >= LEAST_PIECES:
            changes = np.array(means)
    return float(changes.std(ddof=1) / np.sqrt(len(changes)))


@dataclass(frozen=True)
class LossChanges:
    """Measured loss changes of single cuts.

    Attributes:
        blocks: Per block, of its removal.
        widths: Per dimension and count, of keeping so many; the dense count changes nothing and is left out.
        dense_loss: Loss of the dense model.
        frames: Frames that they are means over.
        reliability: Rank correlation to be expected with another measurement over as many frames.
    """

    blocks: Mapping[str, LossChange]
    widths: Mapping[str, Mapping[int, LossChange]]
    dense_loss: float = 0.0
    frames: int = 0
    reliability: float = 1.0


@dataclass(frozen=True)
class ValueTerm:
    """A part of a plan's value.

    Attributes:
        name: For people.
        dimensions: Axes of ``value``.
        block: The term counts while this block is kept; None: always.
        value: In units of loss; below 0 where keeping the block is worth less than its parts.
    """

    name: str
    dimensions: tuple[str, ...]
    block: str | None
    value: np.ndarray


@dataclass(frozen=True)
class LossValues:
    """The value terms of a space; the value that a plan lacks to the dense one is its predicted loss change.

    Attributes:
        space: What may be pruned.
        changes: What was measured.
        factors: Correction of the loss change of a dimension or block; 1 where it is not named.
    """

    space: PruningSpace
    changes: LossChanges
    factors: Mapping[str, float] = field(default_factory=dict)

    def corrected(self, factors: Mapping[str, float]) -> LossValues:
        """With further factors on the loss changes."""
        known = {name: self.factors.get(name, 1.0) * factor for name, factor in factors.items()}
        return replace(self, factors={**self.factors, **known})

    def width_change(self, dimension: Dimension) -> np.ndarray:
        """Loss change of every option: measured, not below 0, never less for fewer elements, linear in between."""
        measured = self.changes.widths[dimension.name]
        counts = [*sorted(measured), dimension.size]
        found = [max(measured[count].mean, 0.0) for count in counts[:-1]] + [0.0]
        falling = np.maximum.accumulate(found[::-1])[::-1]
        return np.interp(dimension.options, counts, falling) * self.factors.get(dimension.name, 1.0)

    def block_change(self, block: str) -> float:
        """Loss change of removing a block; below 0 where it does harm."""
        return self.changes.blocks[block].mean * self.factors.get(block, 1.0)

    def to_json(self) -> dict[str, Any]:
        """What was measured, for people: loss changes with their standard errors."""
        changes = self.changes
        return {
            "dense_loss": changes.dense_loss,
            "frames": changes.frames,
            "reliability": changes.reliability,
            "blocks": {name: vars(change) for name, change in changes.blocks.items()},
            "widths": {
                name: {str(count): vars(change) for count, change in sorted(counts.items())}
                for name, counts in changes.widths.items()
            },
        }

    def terms(self) -> tuple[ValueTerm, ...]:
        """Value terms of the program.

        A dimension is worth, at each option, the loss that it saves against the smallest one; a width within heads, by
        the share of heads that is kept. A block is worth its own loss change less that of everything in it at its
        smallest, so that each single cut and each single removal change the value by what was measured. It may be below
        0: a layer may go at less than its parts cost one by one.
        """
        homes = dimension_homes(self.space)
        parts: dict[str | None, float] = {}
        terms = []
        for dimension in self.space.dimensions:
            change = self.width_change(dimension)
            names: tuple[str, ...] = (dimension.name,)
            value = change[0] - change
            if dimension.within is not None:
                heads = self.space.by_name[dimension.within]
                share = np.array(heads.options)[:, None] / heads.size
                names, value = (heads.name, dimension.name), change[0] - share * change
            home = homes[dimension.name]
            parts[home] = parts.get(home, 0.0) + float(change[0])
            terms.append(ValueTerm(f"value of {dimension.name}", names, home, value))
        for block in self.space.blocks:
            parts[block.parent] = parts.get(block.parent, 0.0) + self.block_change(block.name)
        for block in self.space.blocks:
            own = self.block_change(block.name) - parts.get(block.name, 0.0)
            terms.append(ValueTerm(f"value of {block.name}", (), block.name, np.array(own)))
        return tuple(terms)


def dimension_homes(space: PruningSpace) -> dict[str, str | None]:
    """Per dimension, the innermost block that holds every operator that it changes."""
    homes: dict[str, str | None] = {}
    for dimension in space.dimensions:
        chains = [space.chain(term.block) for term in space.terms if dimension.name in term.dimensions]
        common = [block for block in chains[0] if all(block in chain for chain in chains)] if chains else []
        homes[dimension.name] = common[0] if common else None
    return homes
