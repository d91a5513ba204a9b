"""Global dimensions fixed at one combination of their options: a smaller problem over the other dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mdp_mmdet3d.solver.problem import ProblemStructure, ProblemTerm, PruningProblem


@dataclass(frozen=True)
class Condition:
    """One combination of the global dimensions' options and what it leaves.

    Attributes:
        original: The problem with its global dimensions.
        combination: Per global dimension, the index of its option.
        problem: The rest, without global dimensions.
    """

    original: PruningProblem
    combination: tuple[int, ...]
    problem: PruningProblem

    def lift(self, plan: ProblemStructure) -> ProblemStructure:
        """The original's canonical plan for a plan of `problem`."""
        rest = iter(plan.options)
        fixed = dict(zip(self.original.global_dimensions, self.combination))
        options = tuple(fixed[d] if d in fixed else next(rest) for d in range(len(self.original.dimensions)))
        return self.original.canonical(ProblemStructure(options, plan.kept))

    def lower(self, plan: ProblemStructure) -> ProblemStructure:
        """The original's plan without its global dimensions, whatever they are."""
        chosen = self.original.global_dimensions
        return ProblemStructure(tuple(k for d, k in enumerate(plan.options) if d not in chosen), plan.kept)


def conditions(problem: PruningProblem) -> Iterator[Condition]:
    """Every combination of the global dimensions' options, the dense one first."""
    counts = [len(problem.dimensions[d].options) for d in problem.global_dimensions]
    for combination in itertools.product(*(reversed(range(count)) for count in counts)):
        yield condition(problem, combination)


def condition(problem: PruningProblem, combination: tuple[int, ...]) -> Condition:
    """The problem with its global dimensions fixed at ``combination``."""
    fixed = dict(zip(problem.global_dimensions, combination))
    local = [d for d in range(len(problem.dimensions)) if d not in fixed]
    place = {d: index for index, d in enumerate(local)}

    def conditioned(term: ProblemTerm) -> ProblemTerm:
        if fixed.keys().isdisjoint(term.dimensions):
            return ProblemTerm(**{**vars(term), "dimensions": tuple(place[d] for d in term.dimensions)})
        index = tuple(fixed[d] if d in fixed else slice(None) for d in term.dimensions)
        return ProblemTerm(
            term.name,
            tuple(place[d] for d in term.dimensions if d in place),
            term.block,
            {metric: cost[index] for metric, cost in term.costs.items()},
            None if term.value is None else term.value[index],
            None if term.allowed is None else np.asarray(term.allowed[index]),
            term.when_removed,
        )

    counts = ", ".join(f"{problem.dimensions[d].name} = {problem.dimensions[d].options[k]}" for d, k in fixed.items())
    rest = PruningProblem(
        f"{problem.name} at {counts}",
        problem.metrics,
        tuple(problem.dimensions[d] for d in local),
        problem.blocks,
        tuple(conditioned(term) for term in problem.terms),
    )
    return Condition(problem, combination, rest)
