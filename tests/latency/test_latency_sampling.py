from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latency_spaces import CONV, SELF_ATTENTION, small_space

from mdp_mmdet3d.latency import entries_of, exact_entries, fit_structures, grid_entries, smallest_structure
from mdp_mmdet3d.latency.backends.fake import FakeBackend
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.sampling import sampled_widths
from mdp_mmdet3d.latency.structures import random_structure


@given(st.lists(st.integers(1, 4096), min_size=1, unique=True).map(sorted), st.integers(2, 6))
def test_smallest_and_dense_are_always_sampled(options, count):
    chosen = sampled_widths(tuple(options), count)
    assert (chosen[0], chosen[-1]) == (options[0], options[-1])
    assert set(chosen) <= set(options) and list(chosen) == sorted(set(chosen)) and len(chosen) <= count
    assert sampled_widths(tuple(options), None) == tuple(options)


def test_the_grid_is_rectangular_and_holds_each_point_once():
    keys = grid_entries(small_space())
    assert len(keys) == len(set(keys))
    widths = defaultdict(set)
    for signature, key in keys:
        widths[signature].add(key)
    for found in widths.values():
        assert found == set(product(*(sorted(set(axis)) for axis in zip(*found, strict=True))))
    assert {key[0] for key in widths[SELF_ATTENTION]} == {1, 2, 3, 4}
    assert {key[1:] for key in widths[SELF_ATTENTION]} == {(8, 8), (8, 32), (32, 8), (32, 32)}


def test_operators_that_run_once_are_not_measured():
    space = small_space()
    assert not any(
        "tokens=20" in s.key and w[1] != 0 and s not in {t.signature for t in space.frame_terms()}
        for s, w in exact_entries(space)
    )
    assert len(exact_entries(space)) == 4 + 4 + 64 + 64 + 64 + 8 + 8


@pytest.mark.parametrize("seed", range(8))
def test_every_structure_uses_exact_points_within_the_range_of_the_grid(seed):
    space = small_space()
    structure = random_structure(space, seed, skew=seed % 2 == 0)
    used = entries_of(space, structure.widths, structure.removed)
    assert set(used) <= set(exact_entries(space))
    grid = defaultdict(list)
    for signature, widths in grid_entries(space):
        grid[signature].append(widths)
    for signature, widths in used:
        for width, axis in zip(widths, zip(*grid[signature], strict=True), strict=True):
            assert min(axis) <= width <= max(axis)


def test_removed_blocks_take_their_terms_and_their_children_along():
    space = small_space()
    everything = entries_of(space, {}, ())
    without_layer = entries_of(space, {}, {"layer"})
    assert {s.kind for s, _ in everything} - {s.kind for s, _ in without_layer} == {"attention", "ffn"}
    assert [w for s, w in entries_of(space, {"stage": 16}, {"block"}) if s == CONV] == [(16, 64)]


def test_the_fit_spans_the_dense_and_the_smallest_structure():
    space = small_space()
    structures = fit_structures(space, 5, seed=3)
    assert len(structures) == 5 and structures == fit_structures(space, 5, seed=3)
    assert structures[0].widths == {d.name: d.size for d in space.dimensions} and not structures[0].removed
    assert structures[1] == smallest_structure(space)
    assert structures[1].removed == {"block", "layer"}
    for structure in structures:
        assert all(structure.widths[d.name] in d.options for d in space.dimensions)
    with pytest.raises(ValueError, match="count is 1"):
        fit_structures(space, 1)


def test_the_sparse_grid_is_smaller_and_covers_every_option(tmp_path):
    space = small_space()
    sparse, grid = grid_entries(space, sparse=True), grid_entries(space)
    assert set(sparse) < set(grid) and {s for s, _ in sparse} == {s for s, _ in grid}
    for signature in {s for s, _ in sparse}:
        for axis in zip(*(w for s, w in sparse if s == signature)):
            assert set(axis) == {min(axis), max(axis)}
    table = measure_latency(space, FakeBackend(), tmp_path / "t.json", policy="sparse", progress=False)
    assert len(table) == len(sparse)
    for term in space.frame_terms():
        ms, _ = table.cost_array(space, term)
        assert (ms >= 0).all()


def test_a_fixed_input_between_layouts_is_measured_and_not_interpolated():
    """An SE gate with 10 channels of EfficientNet, beside others of the same signature with 6 and 28."""
    space = small_space()
    term = next(t for t in space.terms if t.signature == CONV)
    free = next(width for width in term.widths if isinstance(width, str))
    terms = tuple(replace(term, name=f"gate{fixed}", widths=(fixed, free), block=None) for fixed in (6, 10, 20, 28))
    keys = grid_entries(replace(space, terms=(*space.terms, *terms)), sparse=True)
    smallest, dense = space.by_name[free].options[0], space.by_name[free].options[-1]
    inputs = {widths[0] for signature, widths in keys if signature == CONV}
    assert {6, 10} <= inputs and 20 not in inputs
    assert {(CONV, (10, smallest)), (CONV, (10, dense))} <= set(keys)
