"""Values in units of loss: every single cut changes the value by what was measured; narrower is never worth more."""

import itertools

import numpy as np
import pytest

from mdp_mmdet3d.importance.loss_changes import single_cuts, spearman
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.importance.values import LossChange, LossChanges, LossValues, dimension_homes, standard_error
from mdp_mmdet3d.operators import OperatorSignature
from mdp_mmdet3d.solver.build import LATENCY, Ranking, build_problem
from mdp_mmdet3d.solver.problem import ProblemStructure
from mdp_mmdet3d.space.types import (
    Block,
    BlockKind,
    CostTerm,
    Dimension,
    DimensionKind,
    PruningSpace,
    ScoreSource,
    TensorAxis,
)

HEADS, QK, V, HIDDEN, SHARED, PRIVATE = "layer.attn.heads", "layer.attn.qk", "layer.attn.v", "layer.ffn.out", "s", "b.c"


def dimension(name, kind, size, options, block, copies=1, within=None):
    axes = (TensorAxis(f"{name}.weight", 0),)
    sources = () if kind is DimensionKind.HEADS else (ScoreSource(axes, block),)
    return Dimension(name, kind, size, options, axes, sources, copies, within)


@pytest.fixture
def space():
    """A stage with a block, and a layer of two sub-layers, the first an attention."""
    dimensions = (
        dimension(SHARED, DimensionKind.CHANNELS, 32, (8, 16, 24, 32), None),
        dimension(PRIVATE, DimensionKind.CHANNELS, 16, (8, 16), "b"),
        dimension(HEADS, DimensionKind.HEADS, 4, (1, 2, 3, 4), None),
        dimension(QK, DimensionKind.QK_WIDTH, 16, (4, 8, 12, 16), "layer.attn", 4, HEADS),
        dimension(V, DimensionKind.V_WIDTH, 16, (8, 16), "layer.attn", 4, HEADS),
        dimension(HIDDEN, DimensionKind.HIDDEN, 64, (16, 32, 48, 64), "layer.ffn"),
    )
    blocks = (
        Block("b", BlockKind.IDENTITY),
        Block("layer", BlockKind.LAYER),
        Block("layer.attn", BlockKind.SUB_LAYER, "layer"),
        Block("layer.ffn", BlockKind.SUB_LAYER, "layer"),
    )

    def term(name, widths, block):
        signature = OperatorSignature.make("ffn", tokens=1, embed_dims=1)
        return CostTerm(name, signature, widths, block, "head")

    terms = (
        term("stem", (SHARED,), None),
        term("conv", (SHARED, PRIVATE), "b"),
        term("attn", (HEADS, QK, V), "layer.attn"),
        term("ffn", (HIDDEN,), "layer.ffn"),
    )
    return PruningSpace("toy", "digest", dimensions, blocks, terms, once=())


@pytest.fixture
def table(space):
    rng = np.random.default_rng(0)
    scores = {d.name: {s.block: rng.random((d.copies, d.size)) for s in d.sources} for d in space.dimensions}
    return ImportanceTable("digest", "w", 1, 0, 1, scores)


class Free:
    total_fixed_ms = 1.0

    def __init__(self, space):
        self.space = space

    def cost_array(self, term):
        shape = [len(self.space.by_name[name].options) for name in term.dimensions]
        return np.ones(shape), np.zeros(shape, dtype=bool)


def random_changes(space, seed, every_width=True):
    """Falling with the count, as if there were no noise; blocks may do good or harm."""
    rng = np.random.default_rng(seed)
    widths = {}
    for d in space.dimensions:
        counts = d.options[:-1] if every_width else d.options[:1]
        found = np.sort(rng.exponential(size=len(counts)))[::-1]
        widths[d.name] = {count: LossChange(float(change)) for count, change in zip(counts, found)}
    return LossChanges({b.name: LossChange(float(rng.normal())) for b in space.blocks}, widths)


def program(space, table, values):
    return build_problem(space, table, Free(space), Ranking.by_importance(space, table), values)


def indices(space, widths=None, removed=()):
    options = tuple(d.options.index((widths or {}).get(d.name, d.size)) for d in space.dimensions)
    return ProblemStructure(options, tuple(not set(space.chain(b.name)) & set(removed) for b in space.blocks))


@pytest.mark.parametrize("seed", range(10))
def test_every_single_cut_changes_the_value_by_what_was_measured(space, table, seed):
    changes = random_changes(space, seed)
    problem = program(space, table, LossValues(space, changes))
    for block in space.blocks:
        lost = problem.dense.value - problem.evaluate(indices(space, removed=[block.name])).value
        assert lost == pytest.approx(changes.blocks[block.name].mean)
    for d in space.dimensions:
        for count, change in changes.widths[d.name].items():
            lost = problem.dense.value - problem.evaluate(indices(space, {d.name: count})).value
            assert lost == pytest.approx(change.mean)


@pytest.mark.parametrize("seed", range(5))
def test_cuts_of_different_parts_add_up_and_a_removed_block_counts_once(space, table, seed):
    changes = random_changes(space, seed)
    problem = program(space, table, LossValues(space, changes))

    def lost(widths, removed=()):
        return problem.dense.value - problem.evaluate(indices(space, widths, removed)).value

    assert lost({SHARED: 16, HIDDEN: 32}) == pytest.approx(lost({SHARED: 16}) + lost({HIDDEN: 32}))
    assert lost({}, ["b", "layer"]) == pytest.approx(lost({}, ["b"]) + lost({}, ["layer"]))
    assert lost({PRIVATE: 8, QK: 4, HIDDEN: 16}, ["b", "layer"]) == pytest.approx(lost({}, ["b", "layer"]))
    # Fewer heads leave fewer widths to be narrowed.
    assert lost({HEADS: 1, QK: 4}) == pytest.approx(lost({HEADS: 1}) + lost({QK: 4}) / 4)


def test_no_option_is_worth_more_than_a_wider_one(space, table):
    widths = {
        SHARED: {8: LossChange(0.1), 16: LossChange(0.4), 24: LossChange(-0.2)},
        PRIVATE: {8: LossChange(-0.5)},
        HEADS: {1: LossChange(0.9), 3: LossChange(0.3)},
        QK: {4: LossChange(0.0)},
        V: {8: LossChange(0.2)},
        HIDDEN: {16: LossChange(0.6)},
    }
    values = LossValues(space, LossChanges({b.name: LossChange(1.0) for b in space.blocks}, widths))
    found = {d.name: values.width_change(d).tolist() for d in space.dimensions}
    assert found[SHARED] == pytest.approx([0.4, 0.4, 0.0, 0.0])  # noise may not make fewer better
    assert found[PRIVATE] == [0.0, 0.0]
    assert found[HEADS] == pytest.approx([0.9, 0.6, 0.3, 0.0])
    assert found[HIDDEN] == pytest.approx([0.6, 0.4, 0.2, 0.0])
    problem = program(space, table, values)
    for place, d in enumerate(space.dimensions):
        for plan in (indices(space), indices(space, {HEADS: 2, SHARED: 16}), indices(space, removed=["layer.ffn"])):
            worth = [
                problem.evaluate(
                    ProblemStructure((*plan.options[:place], k, *plan.options[place + 1 :]), plan.kept)
                ).value
                for k in range(len(d.options))
            ]
            assert all(a <= b + 1e-12 for a, b in itertools.pairwise(worth)), d.name


def test_values_that_are_corrected(space, table):
    changes = random_changes(space, 3)
    values = LossValues(space, changes).corrected({SHARED: 2.0, "layer": 0.5}).corrected({SHARED: 2.0})
    problem = program(space, table, values)

    def lost(widths, removed=()):
        return problem.dense.value - problem.evaluate(indices(space, widths, removed)).value

    assert lost({SHARED: 8}) == pytest.approx(4 * changes.widths[SHARED][8].mean)
    assert lost({}, ["layer"]) == pytest.approx(0.5 * changes.blocks["layer"].mean)
    assert lost({}, ["layer.ffn"]) == pytest.approx(changes.blocks["layer.ffn"].mean)


def test_taylor_values_are_as_they_were(space, table):
    plain = program(space, table, None)
    assert {t.name for t in plain.terms} >= {f"value of {d.name}" for d in space.dimensions if d.sources}
    assert plain.dense.value == pytest.approx(sum(a.sum() for blocks in table.scores.values() for a in blocks.values()))
    assert plain.least_value == 0.0 and LATENCY in plain.dense.costs


def test_homes_and_single_cuts(space, table):
    assert dimension_homes(space) == {
        SHARED: None, PRIVATE: "b", HEADS: "layer.attn", QK: "layer.attn", V: "layer.attn", HIDDEN: "layer.ffn"
    }  # fmt: skip
    ranking = Ranking.by_importance(space, table)
    cuts = single_cuts(space, ranking.order, 2)
    assert set(cuts["layer", None].removed) == {"layer", "layer.attn", "layer.ffn"}
    kept = cuts[QK, 4].cuts[QK].kept
    for copy, scores in zip(kept, table.scores[QK]["layer.attn"]):
        assert set(copy) == set(np.argsort(-scores)[:4].tolist())
    assert {count for name, count in cuts if name == HIDDEN} == {16, 48}
    assert len({plan.hash for plan in cuts.values()}) == len(cuts)


def test_rank_correlation():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 1, 2, 2], [1, 1, 5, 9]) == pytest.approx(0.943, abs=1e-3)
    assert spearman([0, 0], [1, 2]) == 1.0


def test_the_standard_error_is_that_of_scenes_whose_frames_are_alike():
    rng = np.random.default_rng(0)
    pieces = np.repeat(np.arange(8), 4)
    drawn = [np.repeat(rng.normal(size=8), 4) + 0.1 * rng.normal(size=32) for _ in range(2000)]
    spread = np.std([changes.mean() for changes in drawn])  # what the error stands for
    assert np.mean([standard_error(changes, pieces) for changes in drawn]) == pytest.approx(spread, rel=0.1)
    assert np.mean([standard_error(changes) for changes in drawn]) < 0.6 * spread
    few = np.repeat(np.arange(2), 16)  # two pieces have no spread to speak of
    assert standard_error(drawn[0], few) == standard_error(drawn[0])
