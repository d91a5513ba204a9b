"""Sum dimensions: counts that follow from others, such as the input of a layer that reads a concatenation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mdp_mmdet3d.solver.problem import InvalidProblemError, ProblemDimension, ProblemTerm, PruningProblem
from mdp_mmdet3d.sums import MAX_OPTIONS, attainable_sums, sum_allowed, sum_options


@dataclass(frozen=True)
class SumPart:
    """What one part adds to a sum.

    Attributes:
        dimension: Index of its dimension.
        block: Index of the block that produces it and without which it counts 0; None if it is always there.
        times: What one of its elements adds.
    """

    dimension: int
    block: int | None = None
    times: int = 1


def add_sum(
    problem: PruningProblem,
    name: str,
    parts: Sequence[SumPart],
    *,
    fixed: int = 0,
    block: int | None = None,
    multiple: int = 1,
    limit: int = MAX_OPTIONS,
) -> tuple[PruningProblem, int]:
    """Add a dimension that is the sum of others, and the terms that tie it to them.

    More than two parts become a chain of partial sums, each with at most ``limit`` options; each is rounded up
    (`mdp_mmdet3d.sums.sum_options`), so the sum is never below the parts'. Terms over the sum are added by the caller.

    Args:
        problem: Problem with the parts' dimensions.
        name: Of the sum; partial sums are called ``name[2]``, ``name[3]``, ... after the number of their parts.
        parts: What is added up, in this order.
        fixed: Count that is always there.
        block: Block that holds the concatenation: the sum means nothing without it. Blocks of parts lie within it.
        multiple: Grid of the options.
        limit: Largest number of options.

    Returns:
        The larger problem and the index of the sum's dimension. A single part that is always there is its own sum.

    Raises:
        InvalidProblemError: No parts, an index out of range, or a part's block outside ``block``.
    """
    for part in parts:
        if not 0 <= part.dimension < len(problem.dimensions):
            raise InvalidProblemError(f"sum {name!r} names dimension {part.dimension} of {len(problem.dimensions)}")
    if not parts:
        raise InvalidProblemError(f"sum {name!r} has no parts")
    draft = _Draft(problem, name, block, multiple, limit)
    ordered = sorted(parts, key=lambda part: part.block is not None)  # a chain starts best with what is always there
    total: int | None = None
    if ordered[0].block is None and ordered[0].times == 1 and not fixed:
        total, ordered = ordered[0].dimension, ordered[1:]
    done = len(parts) - len(ordered)
    for position, part in enumerate(ordered):
        last = position == len(ordered) - 1
        label = name if last else f"{name}[{done + position + 1}]"
        total = draft.add(label, total, part, fixed if position == 0 else 0)
    assert total is not None  # there is a part
    return replace(problem, dimensions=tuple(draft.dimensions), terms=tuple(draft.terms)), total


def options_of(problem: PruningProblem, counts: Mapping[str, int]) -> tuple[int, ...]:
    """Option of every dimension; those of sums follow from their parts.

    Args:
        problem: With or without sums.
        counts: Per dimension that is no sum; one that is missing keeps its dense count.

    Raises:
        ValueError: A count is no option of its dimension.
    """
    links = {
        (term.name, term.dimensions[-1]): term
        for term in reversed(problem.terms)
        if term.allowed is not None and term.dimensions and not term.when_removed
    }
    options: list[int] = []
    for index, dimension in enumerate(problem.dimensions):
        link = links.get((dimension.name, index))
        if link is None or link.allowed is None:
            options.append(dimension.options.index(counts.get(dimension.name, dimension.options[-1])))
        else:  # a sum lies behind its parts, and agrees with one of its options
            options.append(int(np.argmax(link.allowed[tuple(options[part] for part in link.dimensions[:-1])])))
    return tuple(options)


class _Draft:
    """Dimensions and terms so far."""

    def __init__(self, problem: PruningProblem, name: str, block: int | None, multiple: int, limit: int) -> None:
        self.problem, self.name, self.block = problem, name, block
        self.multiple, self.limit = multiple, limit
        self.dimensions = list(problem.dimensions)
        self.terms = list(problem.terms)

    def add(self, label: str, before: int | None, part: SumPart, fixed: int) -> int:
        """Index of a new dimension: the sum ``before``, one part more and ``fixed``."""
        known = [] if before is None else [before]
        counts = [self.dimensions[d].options for d in known]
        added = [part.times * count for count in self.dimensions[part.dimension].options]
        sums = attainable_sums(*counts, added, fixed=fixed)
        if part.block is not None:
            sums += attainable_sums(*counts, fixed=fixed)
        options = sum_options(sums, multiple=self.multiple, limit=self.limit)
        self.dimensions.append(ProblemDimension(label, options))
        total = len(self.dimensions) - 1
        with_part = sum_allowed(*counts, added, options=options, fixed=fixed)
        home = self.block if part.block is None else part.block
        self._link(label, (*known, part.dimension, total), home, with_part)
        if part.block is not None:
            without = sum_allowed(*counts, options=options, fixed=fixed)
            for outer in self._blocks_within(part.block):
                self._link(f"{label} without {self.problem.blocks[outer].name}", (*known, total), outer, without, True)
        return total

    def _blocks_within(self, block: int) -> list[int]:
        """The block and its parents up to the sum's own block, that one not included."""
        if not 0 <= block < len(self.problem.blocks):
            raise InvalidProblemError(f"sum {self.name!r} names block {block} of {len(self.problem.blocks)}")
        chain = self.problem.chains[block]
        if self.block is None:
            return list(chain)
        if self.block not in chain[1:]:
            names = self.problem.blocks[block].name, self.problem.blocks[self.block].name
            raise InvalidProblemError(f"sum {self.name!r}: block {names[0]!r} does not lie within {names[1]!r}")
        return list(chain[: chain.index(self.block)])

    def _link(
        self, name: str, dimensions: tuple[int, ...], block: int | None, allowed: np.ndarray, removed: bool = False
    ) -> None:
        free = {metric: np.zeros(allowed.shape) for metric in self.problem.metrics}
        self.terms.append(ProblemTerm(name, dimensions, block, free, None, allowed, removed))
