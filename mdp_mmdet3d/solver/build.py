"""From pruning space, importance and latency to the program's arrays, and from its answer back to elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

import numpy as np

from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.importance.values import LossValues
from mdp_mmdet3d.solver.links import SumPart, add_sum
from mdp_mmdet3d.solver.problem import ProblemBlock, ProblemDimension, ProblemStructure, ProblemTerm, PruningProblem
from mdp_mmdet3d.space.types import GLOBAL_KINDS, CostTerm, Dimension, PruningSpace, WidthSum, cost_axes

LATENCY = "latency_ms"
MAX_AXES = 3  # dimensions of a term, global ones aside, beyond which a sum becomes one: an attention has as many

Kept = tuple[dict[str, tuple[tuple[int, ...], ...]], frozenset[str]]


class Latency(Protocol):
    """What the program needs to know about latency; `mdp_mmdet3d.latency.predict.LatencyModel` provides it."""

    @property
    def total_fixed_ms(self) -> float:
        """Milliseconds per frame that no plan can save."""

    def cost_array(
        self, term: CostTerm, sums: Mapping[WidthSum, Sequence[int]] = MappingProxyType({})
    ) -> tuple[np.ndarray, np.ndarray]:
        """Milliseconds of a term over the options of its dimensions, and which of them were interpolated.

        A width in ``sums`` is an axis of its own, with these counts; the axes are those of `cost_axes`.
        """


@dataclass(frozen=True)
class Ranking:
    """In which order the elements of every dimension are dropped.

    Attributes:
        order: Per dimension, element indices by falling importance, (copies, size).
    """

    order: Mapping[str, np.ndarray]

    @classmethod
    def by_importance(
        cls, space: PruningSpace, importance: ImportanceTable, kept_blocks: frozenset[str] | None = None
    ) -> Ranking:
        """Rank by the summed score of all members; only of those in ``kept_blocks`` if given."""
        order = {}
        for dimension in space.dimensions:
            scores = _scores(space, importance, dimension, kept_blocks)
            if not scores.any():  # no member survives: the order does not matter, but must stay defined
                scores = _scores(space, importance, dimension, None)
            order[dimension.name] = np.argsort(-scores, axis=1, kind="stable")
        return cls(order)


def _scores(
    space: PruningSpace, importance: ImportanceTable, dimension: Dimension, kept_blocks: frozenset[str] | None
) -> np.ndarray:
    """Score per copy and element; a dimension without sources (heads) adds up what lies within its elements."""
    if dimension.sources:
        return importance.total(dimension.name, kept_blocks)
    inner = [
        importance.total(d.name, kept_blocks).sum(axis=1).reshape(-1, dimension.size).sum(axis=0)
        for d in space.dimensions
        if d.within == dimension.name
    ]
    return np.sum(inner, axis=0)[None] if inner else np.zeros((1, dimension.size))


def build_problem(
    space: PruningSpace,
    importance: ImportanceTable,
    latency: Latency,
    ranking: Ranking,
    values: LossValues | None = None,
) -> PruningProblem:
    """Write down docs/method.md section 5.1 for one model, device and ranking.

    The cost of a layer that reads a concatenation of many parts depends on their sum, which becomes a dimension of the
    program behind those of the space (`links.add_sum`): it is priced at the smallest option not below the sum. With at
    most `MAX_AXES` dimensions in all, a term is over these, and exact.

    Args:
        space: What may be pruned.
        importance: What each element is worth.
        latency: What each operator costs.
        ranking: Order in which elements are dropped; the value of keeping k of them is the sum of the first k.
        values: Values in units of loss, in place of those sums.

    Returns:
        A problem with one metric, ``latency_ms``; its constant term is what cannot be pruned.
    """
    dimension_index = {d.name: i for i, d in enumerate(space.dimensions)}
    block_index = {b.name: i for i, b in enumerate(space.blocks)}

    def term(
        name: str,
        dimensions: tuple[str, ...],
        block: str | None,
        cost: np.ndarray | float,
        value: np.ndarray | None = None,
    ) -> ProblemTerm:
        indices = tuple(dimension_index[d] for d in dimensions)
        shape = tuple(len(space.by_name[d].options) for d in dimensions)
        return ProblemTerm(
            name, indices, None if block is None else block_index[block], {LATENCY: np.broadcast_to(cost, shape)}, value
        )

    terms = [term("not prunable", (), None, latency.total_fixed_ms)]
    whole = {d.name for d in space.dimensions if d.kind in GLOBAL_KINDS}
    summed = [t for t in space.frame_terms() if len(set(t.dimensions) - whole) > MAX_AXES]
    terms += [
        term(t.name, t.dimensions, t.block, latency.cost_array(t)[0]) for t in space.frame_terms() if t not in summed
    ]
    if values is not None:
        terms += [term(v.name, v.dimensions, v.block, 0.0, v.value) for v in values.terms()]
    for dimension in space.dimensions if values is None else ():
        for block, scores in importance.scores.get(dimension.name, {}).items():
            names, value = _value(space, dimension, scores, ranking)
            terms.append(term(f"value of {dimension.name}", names, block, 0.0, value))
    problem = PruningProblem(
        space.model,
        (LATENCY,),
        tuple(ProblemDimension(d.name, d.options) for d in space.dimensions),
        tuple(ProblemBlock(b.name, None if b.parent is None else block_index[b.parent]) for b in space.blocks),
        tuple(terms),
        tuple(dimension_index[name] for name in sorted(whole)),
    )
    return _with_sums(problem, summed, latency, dimension_index, block_index)


def _with_sums(
    problem: PruningProblem,
    terms: Sequence[CostTerm],
    latency: Latency,
    dimension_index: Mapping[str, int],
    block_index: Mapping[str, int],
) -> PruningProblem:
    """Add terms whose cost depends on sums of dimensions, and the sums, each once.

    A sum goes on from the longest one that it begins with: in a dense block every layer reads one part more.
    """
    sums: dict[WidthSum, int] = {}
    for term in sorted(terms, key=lambda t: max(len(w.parts) for w in t.widths if isinstance(w, WidthSum))):
        for width in term.widths:
            if not isinstance(width, WidthSum) or len(width.parts) < 2 or width in sums:
                continue
            known = [s for s in sums if s.fixed == width.fixed and s.parts == width.parts[: len(s.parts)]]
            start = max(known, key=lambda s: len(s.parts), default=None)
            rest = width.parts if start is None else width.parts[len(start.parts) :]
            parts = [SumPart(dimension_index[name], times=times) for name, times in rest]
            parts = parts if start is None else [SumPart(sums[start]), *parts]
            fixed = width.fixed if start is None else 0
            problem, sums[width] = add_sum(problem, f"input of {term.name}", parts, fixed=fixed)
        options = {w: problem.dimensions[sums[w]].options for w in term.widths if isinstance(w, WidthSum) and w in sums}
        axes = tuple(dimension_index[a] if isinstance(a, str) else sums[a] for a in cost_axes(term, options))
        cost = {LATENCY: latency.cost_array(term, options)[0]}
        block = None if term.block is None else block_index[term.block]
        problem = replace(problem, terms=(*problem.terms, ProblemTerm(term.name, axes, block, cost, None)))
    return problem


def _value(
    space: PruningSpace,
    dimension: Dimension,
    scores: np.ndarray,
    ranking: Ranking,
) -> tuple[tuple[str, ...], np.ndarray]:
    """Importance kept by each option; for a width within heads, by each number of heads and width."""
    ordered = np.take_along_axis(scores, ranking.order[dimension.name], axis=1)
    per_copy = np.cumsum(ordered, axis=1)[:, np.array(dimension.options) - 1]
    if dimension.within is None:
        return (dimension.name,), per_copy.sum(axis=0)
    heads = space.by_name[dimension.within]
    per_copy = per_copy.reshape(-1, heads.size, len(dimension.options)).sum(axis=0)  # q/k and v of one head
    per_count = np.cumsum(per_copy[ranking.order[heads.name][0]], axis=0)[np.array(heads.options) - 1]
    return (heads.name, dimension.name), per_count


def kept_elements(space: PruningSpace, ranking: Ranking, plan: ProblemStructure) -> Kept:
    """The elements and blocks that a plan of `build_problem` keeps and removes."""
    kept = {}
    for dimension, option in zip(space.dimensions, plan.options):
        best = ranking.order[dimension.name][:, : dimension.options[option]]
        kept[dimension.name] = tuple(tuple(sorted(int(e) for e in copy)) for copy in best)
    removed = frozenset(b.name for b, stays in zip(space.blocks, plan.kept) if not stays)
    return kept, removed
