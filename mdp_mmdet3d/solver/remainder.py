"""What a reduction leaves, as a smaller `PruningProblem` of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mdp_mmdet3d.solver.graph import FactorGraph
from mdp_mmdet3d.solver.problem import ProblemBlock, ProblemDimension, ProblemStructure, ProblemTerm, PruningProblem


@dataclass(frozen=True)
class Remainder:
    """A reduced problem and the way back.

    Attributes:
        problem: The reduced problem.
        original: The problem it was cut from.
        options: Per dimension of the original, the original indices of the options left.
        dimensions: Per dimension of the reduced problem, its original index.
        blocks: Per block of the reduced problem, its original index.
        kept: Per block of the original, True, False or, where both are left, None.
    """

    problem: PruningProblem
    original: PruningProblem
    options: tuple[np.ndarray, ...]
    dimensions: tuple[int, ...]
    blocks: tuple[int, ...]
    kept: tuple[bool | None, ...]

    def lift(self, plan: ProblemStructure) -> ProblemStructure:
        """The original problem's plan for a plan of the reduced one."""
        options = [int(left[0]) for left in self.options]
        for option, dimension in zip(plan.options, self.dimensions):
            options[dimension] = int(self.options[dimension][option])
        kept = [bool(state) for state in self.kept]
        for stays, block in zip(plan.kept, self.blocks):
            kept[block] = stays
        return self.original.canonical(ProblemStructure(tuple(options), tuple(kept)))

    def lower(self, plan: ProblemStructure) -> ProblemStructure | None:
        """Inverse of `lift`; None where the plan uses what was removed."""
        for block, state in enumerate(self.kept):
            if state is not None and plan.kept[block] != state:
                return None
        options = []
        active = self.original.active_dimensions(plan)
        for dimension, left in enumerate(self.options):
            place = np.flatnonzero(left == plan.options[dimension])
            if not len(place) and dimension in active:
                return None
            if dimension in self.dimensions:
                options.append(int(place[0]) if len(place) else len(left) - 1)
        return ProblemStructure(tuple(options), tuple(plan.kept[block] for block in self.blocks))


def remainder(graph: FactorGraph) -> Remainder:
    """The problem that a restricted graph leaves: fewer options, fixed blocks gone, constant axes squeezed."""
    problem = graph.problem
    kept = [_fixed(graph.kept_states(block)) for block in range(len(problem.blocks))]
    for block, chain in enumerate(problem.chains):
        if kept[block]:
            for parent in chain:
                kept[parent] = True
        elif any(kept[parent] is False for parent in chain):
            kept[block] = False
    options = []
    for states, dimension in zip(graph.states, problem.dimensions):
        left = states[states < len(dimension.options)]
        options.append(left if len(left) else np.array([len(dimension.options) - 1]))
    dimensions = [d for d, left in enumerate(options) if len(left) > 1]
    blocks = [b for b, state in enumerate(kept) if state is None]
    new_dimension = {d: index for index, d in enumerate(dimensions)}
    new_block = {b: index for index, b in enumerate(blocks)}

    def open_block(chain: tuple[int, ...]) -> int | None:
        return next((new_block[b] for b in chain if b in new_block), None)

    terms = []
    for term in problem.terms:
        chain, home, when_removed = problem.home_chain(term), term.block, term.when_removed
        if any(kept[b] is False for b in chain):
            continue
        if home is not None and when_removed:
            if kept[home]:
                continue
            when_removed = kept[home] is None
            chain = (home, *chain) if when_removed else chain
        index = tuple(options[d] if d in new_dimension else options[d][0] for d in term.dimensions)
        terms.append(
            ProblemTerm(
                term.name,
                tuple(new_dimension[d] for d in term.dimensions if d in new_dimension),
                open_block(chain),
                {metric: _cut(cost, index) for metric, cost in term.costs.items()},
                None if term.value is None else _cut(term.value, index),
                None if term.allowed is None else _cut(term.allowed, index),
                when_removed,
            )
        )
    reduced = PruningProblem(
        problem.name,
        problem.metrics,
        tuple(
            ProblemDimension(problem.dimensions[d].name, tuple(problem.dimensions[d].options[k] for k in options[d]))
            for d in dimensions
        ),
        tuple(ProblemBlock(problem.blocks[b].name, open_block(problem.chains[b][1:])) for b in blocks),
        tuple(terms),
    )
    return Remainder(reduced, problem, tuple(options), tuple(dimensions), tuple(blocks), tuple(kept))


def _fixed(mask: np.ndarray) -> bool | None:
    return bool(mask[0]) if mask.all() or not mask.any() else None


def _cut(array: np.ndarray, index: tuple[np.ndarray | int, ...]) -> np.ndarray:
    """``array`` at the given options: an array keeps its axis, a number drops it."""
    for axis in reversed(range(len(index))):
        array = np.take(array, index[axis], axis=axis)
    return array
