"""The paper's ablation as problem transformations: without block removal, with linear latency."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mdp_mmdet3d.solver.problem import ProblemStructure, ProblemTerm, PruningProblem


def channels_only(problem: PruningProblem) -> PruningProblem:
    """The problem in which every block stays; `with_all_blocks` turns its plans into the original's."""
    terms = tuple(replace(term, block=None) for term in problem.terms if not term.when_removed)
    return replace(problem, blocks=(), terms=terms)


def with_all_blocks(problem: PruningProblem, plan: ProblemStructure) -> ProblemStructure:
    """The plan of ``problem`` for a plan of `channels_only`."""
    return ProblemStructure(plan.options, (True,) * len(problem.blocks))


def linear_latency(problem: PruningProblem, at: ProblemStructure) -> PruningProblem:
    """The problem in which what a count saves does not depend on the other counts, which stand as in ``at``.

    This is HALP's model of cost: latency of an output channel at a given number of input channels, blind to the
    input narrowing too. Terms list their dimensions from input to output, so of two the last one counts. The three of
    an attention (heads, q/k width, v width) are all its own: each saves what it saves alone; so do heads and widths
    where a term has a value only.

    Args:
        problem: The problem with its joint tables.
        at: Where the other dimensions stand, the dense plan in HALP's first step.
    """

    def last_axis(term: ProblemTerm, array: np.ndarray) -> np.ndarray:
        return array[tuple(at.options[d] for d in term.dimensions[:-1])]

    def added_up(term: ProblemTerm, array: np.ndarray) -> np.ndarray:
        here = tuple(at.options[d] for d in term.dimensions)
        total = np.full(array.shape, array[here])
        for axis in range(array.ndim):
            along = array[tuple(slice(None) if i == axis else k for i, k in enumerate(here))]
            total += (along - array[here]).reshape([-1 if i == axis else 1 for i in range(array.ndim)])
        return np.maximum(total, 0.0)

    def linear(term: ProblemTerm) -> ProblemTerm:
        if len(term.dimensions) < 2 or term.allowed is not None:
            return term
        inputs = len(term.dimensions) == 2 and any(cost.any() for cost in term.costs.values())
        simplify, dimensions = (last_axis, term.dimensions[-1:]) if inputs else (added_up, term.dimensions)
        return replace(
            term,
            dimensions=dimensions,
            costs={metric: simplify(term, cost) for metric, cost in term.costs.items()},
            value=None if term.value is None else simplify(term, term.value),
        )

    return replace(problem, terms=tuple(linear(term) for term in problem.terms))


def at_most(problem: PruningProblem, plan: ProblemStructure) -> PruningProblem:
    """The problem with the options up to those of ``plan``: what a later step of a schedule may still choose."""
    dimensions = tuple(
        replace(dimension, options=dimension.options[: option + 1])
        for dimension, option in zip(problem.dimensions, plan.options)
    )
    terms = []
    for term in problem.terms:
        window = tuple(slice(plan.options[d] + 1) for d in term.dimensions)
        terms.append(
            replace(
                term,
                costs={metric: cost[window] for metric, cost in term.costs.items()},
                value=None if term.value is None else term.value[window],
                allowed=None if term.allowed is None else term.allowed[window],
            )
        )
    return replace(problem, dimensions=dimensions, terms=tuple(terms))
