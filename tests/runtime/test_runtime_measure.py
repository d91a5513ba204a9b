from __future__ import annotations

import numpy as np
import pytest

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime import measure
from mdp_mmdet3d.runtime.measure import LatencyStats, measure_interleaved, session_device, speedup
from mdp_mmdet3d.runtime.stream import StreamOutput


class FakeRunner:
    """Reports latencies from a script and records every call."""

    def __init__(self, name, log, latencies):
        self.name, self.log, self.latencies = name, log, iter(latencies)

    def start(self, frame):
        self.log.append((self.name, "rig"))

    def reset(self):
        self.log.append((self.name, "reset"))

    def step(self, frame):
        self.log.append((self.name, frame.timestamp))
        return StreamOutput(np.zeros(1), np.zeros(1), next(self.latencies), 1.0)


def test_candidates_take_turns_and_warm_up_is_discarded(stream):
    log: list = []
    runners = {
        "dense": FakeRunner("dense", log, [900, 800, 10, 20, 30, 40]),
        "pruned": FakeRunner("pruned", log, [900, 800, 4, 9, 14, 19]),
    }
    rounds = []
    stats = measure_interleaved(
        runners, stream, rounds=4, warmup=2, on_round=lambda done, total: rounds.append((done, total))
    )
    assert stats["dense"].samples_ms == (11, 21, 31, 41)
    assert stats["pruned"].samples_ms == (5, 10, 15, 20)
    assert stats["dense"].median_ms == 26
    assert stats["dense"].minimum_ms == 11
    assert stats["dense"].engines_ms["image_encoder"] == 20  # settled: median of the fastest three
    assert stats["dense"].settled_ms == 21
    assert stats["dense"].engines_ms["head"] == 1
    assert speedup(stats["dense"], stats["pruned"]) == pytest.approx(np.median([11 / 5, 21 / 10, 31 / 15, 41 / 20]))
    assert rounds == [(i, 6) for i in range(1, 7)]
    steps = [entry for entry in log if isinstance(entry[1], float)]
    assert [name for name, _ in steps] == ["dense", "pruned", "pruned", "dense"] * 3
    pairs = list(zip(steps[::2], steps[1::2]))
    assert all(first[1] == second[1] for first, second in pairs)
    assert [first[1] for first, _ in pairs] == [stream[i % 4].timestamp for i in range(6)]


def test_the_stream_restarts_when_frames_run_out(stream):
    log: list = []
    measure_interleaved({"a": FakeRunner("a", log, [1.0] * 9)}, stream, rounds=9, warmup=0)
    assert log.count(("a", "reset")) == 3
    assert log.count(("a", "rig")) == 1


def test_folders_are_loaded_several_times_in_another_order_and_warm_up_each_time(stream, monkeypatch):
    log: list = []

    def load(folder: str, threads: int) -> FakeRunner:
        log.append((folder, "load"))
        return FakeRunner(folder, log, [900, 10, 20])

    monkeypatch.setattr(measure, "load_runner", load)
    rounds = []
    stats = measure_interleaved(
        {"dense": "d", "pruned": "p"},
        stream,
        rounds=5,
        loads=3,
        warmup=1,
        on_round=lambda done, total: rounds.append((done, total)),
    )
    assert [name for name, what in log if what == "load"] == ["d", "p", "p", "d", "d", "p"]
    assert stats["dense"].samples_ms == stats["pruned"].samples_ms == (11, 21, 11, 21, 11)
    assert rounds == [(i, 8) for i in range(1, 9)]
    assert [name for name, what in log if what == "reset"].count("d") == 3
    log.clear()
    measure_interleaved({"a": "a"}, stream, rounds=2, loads=9, warmup=0)
    assert log.count(("a", "load")) == 2  # no load without a timed round


def test_statistics_of_known_samples():
    stats = LatencyStats.from_samples({"image_encoder": [1, 2, 3, 4, 5], "head": [9, 8, 7, 6, 15]})
    assert stats.samples_ms == (10, 10, 10, 10, 20)
    assert (stats.median_ms, stats.minimum_ms, stats.spread_ms, stats.rounds) == (10, 10, 0, 5)
    assert stats.p90_ms == pytest.approx(16)
    assert stats.fps == pytest.approx(100)
    assert stats.to_json()["fps"] == stats.fps


def test_speedup_needs_common_rounds():
    with pytest.raises(DeploymentError, match="one call"):
        speedup(LatencyStats.from_samples({"model": [1, 2]}), LatencyStats.from_samples({"model": [1, 2, 3]}))


@pytest.mark.parametrize("kwargs", [{"candidates": {}}, {"frames": []}, {"rounds": 1}, {"loads": 0}, {"warmup": -1}])
def test_nothing_to_measure_is_an_error(stream, kwargs):
    arguments = {"candidates": {"a": FakeRunner("a", [], [])}, "frames": stream, **kwargs}
    with pytest.raises(DeploymentError, match="nothing to measure"):
        measure_interleaved(**arguments)


def test_real_engines_can_be_measured(tiny_deployment, stream):
    stats = measure_interleaved({"a": tiny_deployment, "b": tiny_deployment}, stream, rounds=2, warmup=0)
    assert list(stats) == ["a", "b"]
    assert all(sample > 0 for item in stats.values() for sample in item.samples_ms)


def test_the_device_names_what_latency_depends_on():
    device = session_device(threads=1, precision="float32")
    assert device.processor and device.runtime_version
    assert device.threads == 1
