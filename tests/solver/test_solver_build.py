"""The program's arrays say what the nouns say: value and latency of a plan, element by element."""

import numpy as np
import pytest

from mdp_mmdet3d.adapters import InputShape, trace_space
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.solver import ProblemStructure, SolveStatus, solve
from mdp_mmdet3d.solver.build import LATENCY, Ranking, build_problem, kept_elements
from mdp_mmdet3d.solver.rerank import solve_ranked


class ProductLatency:
    """A fake device: a term costs the product of its widths."""

    total_fixed_ms = 2.5

    def __init__(self, space):
        self.space = space

    def of(self, term, counts):
        return 1e-5 * np.prod([float(counts.get(w, w) if isinstance(w, str) else w) for w in term.widths])

    def cost_array(self, term):
        names = term.dimensions
        options = [self.space.by_name[n].options for n in names]
        array = np.empty([len(o) for o in options])
        for index in np.ndindex(array.shape):
            array[index] = self.of(term, {n: o[i] for n, o, i in zip(names, options, index)})
        return array, np.zeros(array.shape, dtype=bool)


@pytest.fixture
def nouns(tiny_model):
    space = trace_space(tiny_model, InputShape(6, 64, 176))
    rng = np.random.default_rng(0)
    scores = {d.name: {s.block: rng.exponential(size=(d.copies, d.size)) for s in d.sources} for d in space.dimensions}
    return space, ImportanceTable(space.model_digest, "random", 1, 0, 1, scores), ProductLatency(space)


def random_indices(space, rng):
    kept = []
    by_name = {b.name: i for i, b in enumerate(space.blocks)}
    for block in space.blocks:
        stays = rng.random() < 0.7
        kept.append(bool(stays and (block.parent is None or kept[by_name[block.parent]])))
    return ProblemStructure(tuple(int(rng.integers(len(d.options))) for d in space.dimensions), tuple(kept))


def kept_value(space, importance, selection):
    """Sum of the scores of every kept element, one by one."""
    kept, removed = selection
    total = 0.0
    for d in space.dimensions:
        for block, scores in importance.scores[d.name].items():
            if any(b in removed for b in space.chain(block)):
                continue
            copies = kept[d.within][0] if d.within else range(d.copies)
            total += sum(scores[c, e] for c in copies for e in kept[d.name][c])
    return total


@pytest.mark.parametrize("seed", range(5))
def test_value_and_latency_of_a_plan(nouns, seed):
    space, importance, latency = nouns
    ranking = Ranking.by_importance(space, importance)
    problem = build_problem(space, importance, latency, ranking)
    plan = random_indices(space, np.random.default_rng(seed))
    kept, removed = kept_elements(space, ranking, plan)
    evaluation = problem.evaluate(plan)
    assert evaluation.value == pytest.approx(kept_value(space, importance, (kept, removed)))
    counts = {name: len(copies[0]) for name, copies in kept.items()}
    expected = latency.total_fixed_ms + sum(
        latency.of(t, counts) for t in space.frame_terms() if not any(b in removed for b in space.chain(t.block))
    )
    assert evaluation.costs[LATENCY] == pytest.approx(expected)


def test_best_elements_are_kept_in_their_original_order(nouns):
    space, importance, latency = nouns
    ranking = Ranking.by_importance(space, importance)
    problem = build_problem(space, importance, latency, ranking)
    half = ProblemStructure(tuple(len(d.options) // 2 for d in space.dimensions), (True,) * len(space.blocks))
    kept, removed = kept_elements(space, ranking, half)
    assert removed == frozenset() and problem.evaluate(half).value < problem.dense.value
    for d in space.dimensions:
        if d.within is None and d.sources:
            scores = importance.total(d.name)[0]
            chosen = set(kept[d.name][0])
            assert list(kept[d.name][0]) == sorted(chosen)
            assert min(scores[list(chosen)]) >= max((scores[e] for e in range(d.size) if e not in chosen), default=0)
    heads = "pts_bbox_head.transformer.decoder.layers.1.attentions.0.attn"
    worth = importance.total(f"{heads}.qk").sum(1) + importance.total(f"{heads}.v").sum(1)
    assert set(kept[f"{heads}.heads"][0]) == set(np.argsort(-worth)[: len(kept[f"{heads}.heads"][0])])


def test_ranking_again_never_loses_value_and_uses_surviving_blocks(nouns):
    space, importance, latency = nouns
    dense = build_problem(space, importance, latency, Ranking.by_importance(space, importance)).dense.costs[LATENCY]
    solution = solve_ranked(space, importance, latency, lambda p: solve(p, {LATENCY: 0.4 * dense}))
    assert solution.result.status is SolveStatus.OPTIMAL
    assert solution.result.objective >= solution.first_objective
    assert solution.result.objective == pytest.approx(kept_value(space, importance, solution.kept))
    assert solution.rounds >= 2


def test_position_embedding_runs_once_and_stays_dense(nouns):
    space, importance, latency = nouns
    dense = build_problem(space, importance, latency, Ranking.by_importance(space, importance)).dense.costs[LATENCY]
    solution = solve_ranked(space, importance, latency, lambda p: solve(p, {LATENCY: 0.3 * dense}))
    assert len(solution.kept[0]["pts_bbox_head.position_encoder.0.out"][0]) == 1024
