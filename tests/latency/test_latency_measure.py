from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
from latency_spaces import small_space

from mdp_mmdet3d.errors import FileFormatError, StructureMismatchError
from mdp_mmdet3d.latency import LatencyTable, entries_of, exact_entries, grid_entries
from mdp_mmdet3d.latency.backends.fake import FakeBackend, product_cost
from mdp_mmdet3d.latency.measure import MAX_ATTEMPTS, measure_latency

ROOT = Path(__file__).resolve().parents[2]


class Interrupted(Exception):
    pass


class InterruptedBackend(FakeBackend):
    """Stops after a number of entries."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def measure(self, keys):
        for count, result in enumerate(super().measure(keys)):
            if count == self.after:
                raise Interrupted
            yield result


class BusyBackend(FakeBackend):
    """Every third measurement falls into a busy moment, in which everything takes twice as long."""

    def measure(self, keys):
        for index, (key, entry) in enumerate(super().measure(keys)):
            busy = 2.0 if index % 3 == 0 else 1.0
            yield key, replace(entry, ms=entry.ms * busy, reference_ms=5.0 * busy)


class QuietBackend(FakeBackend):
    def measure(self, keys):
        for key, entry in super().measure(keys):
            yield key, replace(entry, reference_ms=5.0)


def measure(backend, path, **options):
    return measure_latency(small_space(), backend, path, progress=False, **options)


def test_policies_measure_the_grid_or_everything(tmp_path):
    grid = measure(FakeBackend(), tmp_path / "grid.json")
    assert {(s, w) for s, w, _ in grid} == set(grid_entries(small_space()))
    exact = measure(FakeBackend(), tmp_path / "exact.json", policy="exact")
    assert {(s, w) for s, w, _ in exact} == set(exact_entries(small_space()))
    assert all(entry.ms == product_cost(s, w) for s, w, entry in exact)
    with pytest.raises(ValueError, match="policy 'all'"):
        measure(FakeBackend(), tmp_path / "grid.json", policy="all")


def test_active_measuring_adds_only_what_a_plan_lacks(tmp_path):
    path = tmp_path / "table.json"
    measure(FakeBackend(), path)
    plan = entries_of(small_space(), {"stage": 48, "inner": 80, "hidden": 48}, ())
    backend = FakeBackend()
    table = measure(backend, path, policy="none", extra=plan + plan)
    assert sorted(backend.calls, key=str) == sorted(set(plan) - set(grid_entries(small_space())), key=str)
    assert not any(table.lookup(s, w).interpolated for s, w in plan)


@pytest.mark.parametrize("after", [0, 1, 17])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, after):
    path = tmp_path / "table.json"
    first = InterruptedBackend(after)
    with pytest.raises(Interrupted):
        measure(first, path)
    second = FakeBackend()
    table = measure(second, path)
    assert len(table) == len(grid_entries(small_space()))
    assert len(second.calls) == len(table) - after


def test_a_complete_table_is_not_measured_again(tmp_path):
    measure(FakeBackend(), tmp_path / "table.json")
    before = (tmp_path / "table.json").stat().st_mtime_ns
    again = FakeBackend()
    measure(again, tmp_path / "table.json")
    assert again.calls == [] and (tmp_path / "table.json").stat().st_mtime_ns == before


def test_busy_moments_are_measured_again_and_the_fastest_attempt_counts(tmp_path):
    table = measure(BusyBackend(), tmp_path / "table.json")
    assert all(entry.ms == product_cost(s, w) for s, w, entry in table if (s, w) not in table.disturbed())
    assert len(table.disturbed()) <= len(table) / 3 ** (MAX_ATTEMPTS - 1)
    assert max(entry.attempts for _, _, entry in table) <= MAX_ATTEMPTS
    assert any(entry.attempts > 1 for _, _, entry in table)


def test_disturbed_entries_are_improved_only_on_request(tmp_path):
    path = tmp_path / "table.json"
    measure(BusyBackend(), path)
    disturbed = LatencyTable.load(path).disturbed()
    assert disturbed
    quiet = QuietBackend()
    measure(quiet, path)
    assert quiet.calls == []
    table = measure(quiet, path, improve=True)
    assert set(disturbed) <= set(quiet.calls) and table.disturbed() == []


def test_one_wrong_time_beside_the_grid_is_measured_again(tmp_path):
    class WrongOnce(FakeBackend):
        def measure(self, keys):
            for key, entry in super().measure(keys):
                first = self.calls.count(key) == 1 and key == wrong
                yield key, replace(entry, ms=entry.ms * (2 if first else 1))

    wrong = next(key for key in exact_entries(small_space()) if key not in grid_entries(small_space()))
    measure(FakeBackend(), tmp_path / "table.json")
    backend = WrongOnce()
    table = measure(backend, tmp_path / "table.json", policy="none", extra=[wrong])
    assert backend.calls == [wrong, wrong]
    assert table.lookup(*wrong).ms == product_cost(*wrong)


def test_tables_of_another_device_or_protocol_are_not_continued(tmp_path):
    path = tmp_path / "table.json"
    measure(FakeBackend(processor="one"), path)
    content = path.read_text()
    with pytest.raises(StructureMismatchError, match="'one' and 'two'"):
        measure(FakeBackend(processor="two"), path)
    other = FakeBackend(processor="one")
    other.protocol = replace(other.protocol, runs=9)
    with pytest.raises(StructureMismatchError, match=r"runs: .* and 9"):
        measure(other, path)
    assert path.read_text() == content


def test_a_corrupt_table_is_not_overwritten(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("{")
    with pytest.raises(FileFormatError, match="truncated"):
        measure(FakeBackend(), path)
    assert path.read_text() == "{"


def test_a_killed_process_leaves_a_readable_table_that_is_completed(tmp_path):
    path = tmp_path / "table.json"
    program = textwrap.dedent(f"""
        import sys, time
        sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
        from latency_spaces import small_space
        from mdp_mmdet3d.latency import measure as module
        from mdp_mmdet3d.latency.backends.fake import FakeBackend, product_cost
        module._SAVE_EVERY_S = 0.0
        def slow(signature, widths):
            time.sleep(0.01)
            return product_cost(signature, widths)
        module.measure_latency(small_space(), FakeBackend(slow), {str(path)!r}, progress=False)
    """)
    process = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(LatencyTable.load(path))
    assert 0 < kept < len(grid_entries(small_space()))
    backend = FakeBackend()
    table = measure(backend, path)
    assert len(backend.calls) == len(table) - kept and len(table) == len(grid_entries(small_space()))
