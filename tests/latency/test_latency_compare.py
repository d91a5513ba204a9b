from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from latency_spaces import FFN

from mdp_mmdet3d.latency import Device, Entry, LatencyTable, MeasurementProtocol
from mdp_mmdet3d.latency.compare import compare_tables

ROOT = Path(__file__).resolve().parents[2]


def table(times: dict[int, float], processor: str = "cpu", time: str = "2026-01-01") -> LatencyTable:
    result = LatencyTable(Device(processor, "fake", "1", 1, "float32"), MeasurementProtocol("p", 2, 4, "median", True))
    for width, ms in times.items():
        result.add(FFN, (width,), Entry(ms, 0.0, 4, time))
    return result


def profile(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "profile_latency.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_common_entries_are_compared_and_others_listed():
    comparison = compare_tables(table({16: 1.0, 32: 2.0, 48: 0.0}), table({32: 3.0, 48: 1.0, 64: 4.0}))
    assert comparison.ratios == {(FFN, (32,)): 1.5}
    assert comparison.only_first == [(FFN, (16,))]
    assert comparison.only_second == [(FFN, (64,))]


def test_the_tool_prints_differences_and_merges(tmp_path):
    table({16: 1.0, 32: 2.0}).save(tmp_path / "a.json")
    table({32: 3.0, 64: 4.0}, time="2026-02-01").save(tmp_path / "b.json")
    result = profile("diff", tmp_path / "a.json", tmp_path / "b.json")
    assert result.returncode == 0 and "1 common entries" in result.stdout and "1.500" in result.stdout
    assert profile("merge", tmp_path / "a.json", tmp_path / "b.json").returncode == 0
    merged = LatencyTable.load(tmp_path / "a.json")
    assert [merged.lookup(FFN, (width,)).ms for width in (16, 32, 64)] == [1.0, 3.0, 4.0]


@pytest.mark.parametrize("second, message", [("missing.json", "does not exist"), ("other.json", "other device")])
def test_the_tool_explains_what_it_cannot_do(tmp_path, second, message):
    table({16: 1.0}).save(tmp_path / "a.json")
    table({32: 1.0}, processor="gpu").save(tmp_path / "other.json")
    before = (tmp_path / "a.json").read_text()
    result = profile("merge", tmp_path / "a.json", tmp_path / second)
    assert result.returncode == 2
    assert message in " ".join(result.stdout.split()).replace("another", "other") and "Traceback" not in result.stderr
    assert (tmp_path / "a.json").read_text() == before
