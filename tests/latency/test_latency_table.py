from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
from latency_spaces import CONV, FFN, SELF_ATTENTION, small_space

from mdp_mmdet3d.errors import FileFormatError, StructureMismatchError
from mdp_mmdet3d.latency import Device, Entry, LatencyTable, MeasurementProtocol, NotMeasuredError, grid_entries

DEVICE = Device("cpu", "onnxruntime-cpu", "1.31.0", 1, "float32", "Linux", "3.11")
STAIRS = MeasurementProtocol("sandwich", 2, 4, "median", True)
STRAIGHT = MeasurementProtocol("sandwich", 2, 4, "median", False)


def entry(ms: float, time: str = "2026-01-01T00:00:00", **more) -> Entry:
    return Entry(ms, 0.01, 4, time, **more)


def filled(protocol: MeasurementProtocol = STRAIGHT) -> LatencyTable:
    table = LatencyTable(DEVICE, protocol)
    for signature, widths in grid_entries(small_space()):
        table.add(signature, widths, entry(math.prod(widths) / 1000))
    return table


def test_saved_tables_load_equal(tmp_path):
    table = filled()
    table.save(tmp_path / "table.json")
    loaded = LatencyTable.load(tmp_path / "table.json")
    assert (loaded.device, loaded.protocol) == (table.device, table.protocol)
    assert {(s, w): e for s, w, e in loaded} == {(s, w): e for s, w, e in table}


def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path):
    filled().save(tmp_path / "table.json")
    text = (tmp_path / "table.json").read_text()
    for length in range(0, len(text) - 2, max(1, len(text) // 60)):
        (tmp_path / "cut.json").write_text(text[:length])
        with pytest.raises(FileFormatError, match=r"cut\.json"):
            LatencyTable.load(tmp_path / "cut.json")


@pytest.mark.parametrize(
    "where, value",
    [
        (("schema_version",), 2),
        (("device",), {"processor": "cpu"}),
        (("protocol", "warmup"), "two"),
        (("operators", 0, "operator"), "convolution"),
        (("operators", 0, "entries", 0, "ms"), -1.0),
        (("operators", 0, "entries", 0, "ms"), float("nan")),
        (("operators", 0, "entries", 0, "ms"), None),
        (("operators", 0, "entries", 0, "spread"), float("inf")),
        (("operators", 0, "entries", 0, "widths"), [1]),
        (("operators", 0, "entries", 0, "runs"), True),
        (("operators",), 3),
    ],
)
def test_damaged_values_are_refused(tmp_path, where, value):
    path = tmp_path / "table.json"
    filled().save(path)
    data = json.loads(path.read_text())
    target = data
    for key in where[:-1]:
        target = target[key]
    target[where[-1]] = value
    path.write_text(json.dumps(data))
    with pytest.raises(FileFormatError, match=r"table\.json"):
        LatencyTable.load(path)


@pytest.mark.parametrize(
    "field, value", [("processor", "other"), ("precision", "float16"), ("threads", 2), ("runtime_version", "1.30.0")]
)
def test_another_device_is_refused_unless_forced(tmp_path, field, value):
    path = tmp_path / "table.json"
    filled().save(path)
    device = Device(**{**DEVICE.__dict__, field: value})
    with pytest.raises(StructureMismatchError, match=f"{field}.*{value}"):
        LatencyTable.load(path, device=device)
    assert len(LatencyTable.load(path, device=device, force=True)) == len(filled())
    assert LatencyTable.load(path, device=Device(**{**DEVICE.__dict__, "python": "3.8", "system": "QNX"}))


def test_measured_points_are_exact_and_others_interpolated():
    table = filled()
    assert table.lookup(CONV, (16, 128)).ms == pytest.approx(2.048)
    assert not table.lookup(CONV, (16, 128)).interpolated
    between = table.lookup(CONV, (32, 96))
    assert between.interpolated and between.ms == pytest.approx(32 * 96 / 1000)
    table.add(CONV, (32, 96), entry(77.0))
    assert table.lookup(CONV, (32, 96)).ms == 77.0
    assert table.lookup(CONV, (32, 80)).ms == pytest.approx(32 * 80 / 1000)


def test_convolutions_follow_the_staircase_where_the_protocol_says_so():
    table = LatencyTable(DEVICE, STAIRS)
    for ci, co in product((16, 128), (64, 128)):
        table.add(CONV, (ci, co), entry(ci * co / 64))
    assert table.lookup(CONV, (64, 96)).ms == pytest.approx(64 * 1.56)
    assert table.lookup(CONV, (64, 81)).ms == pytest.approx(64 * 1.56)
    with pytest.raises(NotMeasuredError, match="multiple of 4"):
        table.lookup(CONV, (65, 96))


def test_steps_of_a_runtime_without_known_staircase_are_refused():
    table = LatencyTable(Device("cpu", "another-runtime", "1", 1, "float32"), STAIRS)
    for ci, co in product((16, 128), (64, 128)):
        table.add(CONV, (ci, co), entry(ci * co / 64))
    assert table.lookup(CONV, (16, 64)).ms == pytest.approx(16)
    with pytest.raises(NotMeasuredError, match=r"'another-runtime'.*staircases\.py"):
        table.lookup(CONV, (64, 96))


@pytest.mark.parametrize(
    "signature, widths", [(CONV, (8, 64)), (CONV, (16, 256)), (FFN, (8,)), (SELF_ATTENTION, (5, 8, 8))]
)
def test_nothing_is_extrapolated(signature, widths):
    with pytest.raises(NotMeasuredError, match=r"outside the measured range"):
        filled().lookup(signature, widths)


def test_unknown_operators_are_named():
    with pytest.raises(NotMeasuredError, match="ffn"):
        LatencyTable(DEVICE, STRAIGHT).lookup(FFN, (64,))


def test_a_width_of_zero_costs_nothing():
    assert filled().lookup(CONV, (0, 64)).ms == 0.0
    assert not filled().lookup(CONV, (0, 64)).interpolated


def test_cost_arrays_hold_every_combination_of_options():
    space, table = small_space(), filled()
    for term in space.frame_terms():
        ms, interpolated = table.cost_array(space, term)
        names = term.dimensions
        assert ms.shape == interpolated.shape == tuple(len(space.by_name[name].options) for name in names)
        for index in np.ndindex(ms.shape):
            counts = {name: space.by_name[name].options[i] for name, i in zip(names, index, strict=True)}
            found = table.lookup(term.signature, tuple(counts.get(w, w) for w in term.widths))
            assert (ms[index], interpolated[index]) == (found.ms, found.interpolated)


def test_merging_takes_what_is_missing_or_newer():
    old, new = LatencyTable(DEVICE, STRAIGHT), LatencyTable(DEVICE, STRAIGHT)
    old.add(FFN, (16,), entry(1.0, "2026-01-02"))
    old.add(FFN, (32,), entry(2.0, "2026-01-01"))
    new.add(FFN, (16,), entry(9.0, "2026-01-01"))
    new.add(FFN, (32,), entry(8.0, "2026-01-03"))
    new.add(FFN, (64,), entry(7.0, "2026-01-01"))
    assert old.merge(new) == 2
    assert [old.lookup(FFN, (w,)).ms for w in (16, 32, 64)] == [1.0, 8.0, 7.0]
    other = LatencyTable(Device("gpu", "tensorrt", "10", 0, "float16"), STRAIGHT)
    with pytest.raises(StructureMismatchError, match="gpu"):
        old.merge(other)


def test_entries_beside_a_slow_reference_are_disturbed():
    table = LatencyTable(DEVICE, STRAIGHT)
    for width, reference in ((16, 4.0), (32, 4.3), (64, 8.0), (128, 0.0)):
        table.add(FFN, (width,), entry(1.0, reference_ms=reference))
    assert table.disturbed() == [(FFN, (64,))]


def test_what_is_expected_of_a_point_comes_from_the_others():
    table = filled()
    table.add(CONV, (48, 48), entry(99.0))
    assert table.expected_ms(CONV, (48, 48)) == pytest.approx(48 * 48 / 1000)
    table.add(FFN, (48,), entry(99.0))
    assert table.expected_ms(FFN, (48,)) == pytest.approx(48 / 1000)
    assert table.expected_ms(CONV, (16, 16)) is None
