"""The paper's ablation as problem transformations: without block removal, with linear latency."""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from mdp_mmdet3d.solver.problem import PlanIndices, ProblemTerm, PruningProblem


def channels_only(problem: PruningProblem) -> PruningProblem:
    """The problem in which every block stays; `with_all_blocks` turns its plans into the original's."""
    terms = tuple(replace(term, block=None) for term in problem.terms)
    return replace(problem, blocks=(), terms=terms)


def with_all_blocks(problem: PruningProblem, plan: PlanIndices) -> PlanIndices:
    """The plan of ``problem`` for a plan of `channels_only`."""
    return PlanIndices(plan.options, (True,) * len(problem.blocks))


def linear_latency(problem: PruningProblem, at: PlanIndices) -> PruningProblem:
    """The problem in which a term depends on its last dimension only, the others being fixed as in ``at``.

    This is HALP's model of cost: latency of an output channel at a given number of input channels, blind to the
    input narrowing too. Terms list their dimensions from input to output.

    Args:
        problem: The problem with its joint tables.
        at: Where the other dimensions stand, the dense plan in HALP's first step.
    """
    def last_axis(term: ProblemTerm, array: np.ndarray) -> np.ndarray:
        return array[tuple(at.options[d] for d in term.dimensions[:-1])]

    terms = tuple(
        ProblemTerm(
            term.name, term.dimensions[-1:], term.block,
            {metric: last_axis(term, cost) for metric, cost in term.costs.items()},
            None if term.value is None else last_axis(term, term.value),
        ) if len(term.dimensions) > 1 else term
        for term in problem.terms
    )
    return replace(problem, terms=terms)


def at_most(problem: PruningProblem, plan: PlanIndices) -> PruningProblem:
    """The problem with the options up to those of ``plan``: what a later step of a schedule may still choose."""
    dimensions = tuple(replace(dimension, options=dimension.options[:option + 1])
                       for dimension, option in zip(problem.dimensions, plan.options))
    terms = []
    for term in problem.terms:
        window = tuple(slice(plan.options[d] + 1) for d in term.dimensions)
        terms.append(replace(term, costs={metric: cost[window] for metric, cost in term.costs.items()},
                             value=None if term.value is None else term.value[window]))
    return replace(problem, dimensions=dimensions, terms=tuple(terms))
