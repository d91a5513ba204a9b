from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from latency_spaces import small_space

from mdp_mmdet3d.latency import (
    LatencyModel,
    LatencyTable,
    MeasuredNetwork,
    NotMeasuredError,
    exact_entries,
    fit_structures,
)
from mdp_mmdet3d.latency.backends.fake import FakeBackend, product_cost
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.structures import random_structure

SCALE = {"image_encoder": 1.05, "head": 0.9}
FIXED = {"image_encoder": 0.0, "head": 2.5}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return measure_latency(
        small_space(), FakeBackend(), tmp_path_factory.mktemp("t") / "table.json", policy="exact", progress=False
    )


def truth(structure) -> dict[str, float]:
    """Whole measurement of a machine whose engines follow SCALE and FIXED."""
    space, totals = small_space(), dict(FIXED)
    for term in space.frame_terms():
        if structure.removed.isdisjoint(space.chain(term.block)):
            widths = tuple(w if isinstance(w, int) else structure.widths[w] for w in term.widths)
            totals[term.engine] += SCALE[term.engine] * product_cost(term.signature, widths)
    return totals


def fitted(table, count: int = 4) -> LatencyModel:
    networks = [MeasuredNetwork(s.widths, s.removed, truth(s)) for s in fit_structures(small_space(), count)]
    return LatencyModel.fit(small_space(), table, networks)


def test_scale_and_fixed_part_are_recovered(table):
    model = fitted(table)
    assert model.scale == pytest.approx(SCALE)
    assert model.fixed_ms == pytest.approx(FIXED, abs=1e-6)
    assert model.total_fixed_ms == pytest.approx(2.5)


@pytest.mark.parametrize("seed", range(6))
def test_structures_outside_the_fit_are_predicted(table, seed):
    structure = random_structure(small_space(), seed, skew=seed % 2 == 0)
    expected = truth(structure)
    model = fitted(table)
    assert model.predict_engines(structure.widths, structure.removed) == pytest.approx(expected)
    assert model.predict(structure.widths, structure.removed) == pytest.approx(sum(expected.values()))
    rows = model.breakdown(structure.widths, structure.removed)
    assert sum(rows.values()) == pytest.approx(sum(expected.values()))
    assert list(rows.values()) == sorted(rows.values(), reverse=True)


def test_cost_arrays_and_the_fixed_part_add_up_to_the_prediction(table):
    space, model = small_space(), fitted(table)
    structure = random_structure(space, 11)
    total = model.total_fixed_ms
    for term in space.frame_terms():
        if structure.removed.isdisjoint(space.chain(term.block)):
            ms, _ = model.cost_array(term)
            total += ms[tuple(space.by_name[n].options.index(structure.widths[n]) for n in term.dimensions)]
    assert total == pytest.approx(model.predict(structure.widths, structure.removed))


def test_the_fixed_part_is_never_negative(table):
    dense = LatencyModel.from_dense(small_space(), table, {"image_encoder": 1e-3, "head": 1e-3})
    assert min(dense.fixed_ms.values()) == 0.0
    assert dense.predict({}) == pytest.approx(2e-3)
    networks = [
        MeasuredNetwork(s.widths, s.removed, {k: v**1.1 for k, v in truth(s).items()})
        for s in fit_structures(small_space(), 5)
    ]
    assert min(LatencyModel.fit(small_space(), table, networks).fixed_ms.values()) >= 0


def test_the_dense_model_alone_is_matched_exactly_and_the_doubt_is_stated(table):
    dense = fit_structures(small_space(), 2)[0]
    model = LatencyModel.from_dense(small_space(), table, truth(dense))
    assert model.predict_engines({}) == pytest.approx(truth(dense))
    assert len(set(model.scale.values())) == 1
    assert min(model.fixed_ms.values()) == pytest.approx(0.0) and max(model.fixed_ms.values()) > 0
    assert all("cannot tell" in line for line in model.explanation)


def test_refitting_adds_to_what_was_measured_before(table):
    dense, *others = fit_structures(small_space(), 5)
    model = LatencyModel.from_dense(small_space(), table, truth(dense))
    model = model.refit([MeasuredNetwork(s.widths, s.removed, truth(s)) for s in others])
    assert model.scale == pytest.approx(SCALE)
    assert len(model.networks) == 5


def test_interpolated_entries_are_counted_once(tmp_path):
    space = small_space()
    model = LatencyModel.from_dense(
        space,
        measure_latency(space, FakeBackend(), tmp_path / "t.json", progress=False),
        {"image_encoder": 1e3, "head": 1e3},
    )
    assert model.interpolated_entries({}) == []
    assert len(model.interpolated_entries({"stage": 48})) == 3  # 48 x 128, 128 x 48 and 48 x 64
    assert len(model.interpolated_entries({"stage": 48}, {"block"})) == 1


@pytest.mark.parametrize(
    "engines",
    [{"image_encoder": 5.0}, {"image_encoder": 5.0, "head": 0.0}, {"image_encoder": float("nan"), "head": 1.0}],
)
def test_missing_or_impossible_times_are_refused(table, engines):
    with pytest.raises(ValueError, match="no positive time"):
        LatencyModel.from_dense(small_space(), table, engines)


def test_names_that_the_space_does_not_have_are_refused(table):
    with pytest.raises(NotMeasuredError, match="stagge"):
        fitted(table).predict({"stagge": 16})


def test_whole_times_that_fall_with_the_operators_are_refused(table):
    networks = [
        MeasuredNetwork(s.widths, s.removed, {k: 10.0 / v for k, v in truth(s).items()})
        for s in fit_structures(small_space(), 2)
    ]
    with pytest.raises(ValueError, match="do not grow"):
        LatencyModel.fit(small_space(), table, networks)


def test_a_fit_that_is_far_off_is_doubted_with_its_figures_and_the_remedy(table):
    assert fitted(table).doubts == ()
    structures = fit_structures(small_space(), 4)
    times = [truth(structure) for structure in structures]
    times[2] = {**times[2], "head": 4 * times[2]["head"]}
    networks = [MeasuredNetwork(s.widths, s.removed, ms) for s, ms in zip(structures, times, strict=True)]
    (doubt,) = LatencyModel.fit(small_space(), table, networks).doubts
    assert doubt.startswith("head: ") and "of the 4 that it was fitted to" in doubt and "whole_latency.json" in doubt
    # Networks that are alike cannot be fitted with a slope: the doubt is the same.
    alike = [MeasuredNetwork({}, (), {k: factor * v for k, v in truth(structures[0]).items()}) for factor in (1, 3)]
    assert len(LatencyModel.fit(small_space(), table, alike).doubts) == 2


def test_a_table_that_is_mostly_disturbed_is_doubted(tmp_path):
    quiet = measure_latency(small_space(), FakeBackend(), tmp_path / "table.json", policy="exact", progress=False)
    entries = list(quiet)
    for share, doubtful in ((0.4, False), (0.6, True)):
        table = LatencyTable(quiet.device, quiet.protocol)
        for index, (signature, widths, entry) in enumerate(entries):
            busy = index < share * len(entries)
            table.add(signature, widths, replace(entry, reference_ms=2.0 if busy else 1.0))
        doubts = fitted(table).doubts
        assert len(doubts) == doubtful
        if doubtful:
            assert f"{len(table.disturbed())} of {len(table)} entries" in doubts[0] and "another --out" in doubts[0]


def test_the_exact_table_needs_no_interpolation(table):
    assert len(table) == len(exact_entries(small_space()))
    assert not any(table.cost_array(small_space(), term)[1].any() for term in small_space().frame_terms())
    assert np.isfinite(fitted(table).predict({}))
