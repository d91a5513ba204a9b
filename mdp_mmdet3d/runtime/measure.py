"""End-to-end latency of exported models, measured side by side (docs/deployment.md, section 4)."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from mdp_mmdet3d.device import Device, processor_name, system_name
from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime.load import Runner, load_runner
from mdp_mmdet3d.runtime.validate import settled

LOADS = 4  # of every candidate; see `measure_interleaved`


@dataclass(frozen=True)
class LatencyStats:
    """Per-frame latency of one candidate; every time in milliseconds.

    Attributes:
        settled_ms: Median of the fastest quarter of the rounds: what the device does while nothing else runs. Other
            processes only ever add time, so this repeats between sessions where the median does not.
        median_ms: Median over rounds of all engines together.
        minimum_ms: Fastest round.
        p90_ms: 90th percentile.
        spread_ms: Inter-quartile range.
        engines_ms: Settled time of every engine alone, by name.
        rounds: Timed rounds.
        samples_ms: Every round in the order of measuring; the k-th of two candidates were taken side by side.
    """

    settled_ms: float
    median_ms: float
    minimum_ms: float
    p90_ms: float
    spread_ms: float
    engines_ms: Mapping[str, float]
    rounds: int
    samples_ms: tuple[float, ...]

    @classmethod
    def from_samples(cls, engines_ms: Mapping[str, Sequence[float]]) -> LatencyStats:
        """Summarise at least two rounds of every engine."""
        total = [sum(times) for times in zip(*engines_ms.values())]
        lower, _, upper = statistics.quantiles(total, n=4, method="inclusive")
        return cls(
            settled_ms=settled(total),
            median_ms=statistics.median(total),
            minimum_ms=min(total),
            p90_ms=statistics.quantiles(total, n=10, method="inclusive")[-1],
            spread_ms=upper - lower,
            engines_ms={name: settled(times) for name, times in engines_ms.items()},
            rounds=len(total),
            samples_ms=tuple(total),
        )

    @property
    def fps(self) -> float:
        """Frames per second at the settled latency."""
        return 1e3 / self.settled_ms

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary for reports."""
        return {**asdict(self), "fps": self.fps}


def measure_interleaved(
    candidates: Mapping[str, str | Path | Runner],
    frames: Sequence[Any],
    *,
    rounds: int = 16,
    loads: int = LOADS,
    warmup: int = 1,
    threads: int = 1,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, LatencyStats]:
    """Time the engines that run every frame, all candidates taking turns in this process.

    What a stream needs once (the position embedding of a rig) is computed ahead, as on a vehicle. In every round each
    candidate runs the same frame; who goes first rotates, so a drifting clock touches all alike. Folders are loaded
    several times and the rounds spread over the loads: a session may be up to 10 % slower than another one of the same
    network for as long as it lives, presumably for where its memory lies (``docs/latency.md``).

    Args:
        candidates: Name -> deployment folder or loaded runner.
        frames: Frames to stream, from the start after every load and when they run out.
        rounds: Timed rounds, at least 2; 16 or more for a figure to report.
        loads: How often all folders are loaded, ``rounds`` times at most; once if one of the candidates is loaded.
        warmup: Untimed rounds after every load: the first runs of a session are up to 1.3 times slower.
        threads: Threads inside one operator, for folders that are loaded here.
        on_round: Called after every round, warm-up included, with (rounds done, rounds in all).

    Returns:
        Statistics by name, in the order of ``candidates``.

    Raises:
        DeploymentError: Nothing to measure, or a folder cannot be run.
    """
    if not candidates or not frames or rounds < 2 or loads < 1 or warmup < 0:
        raise DeploymentError(
            f"nothing to measure: {len(candidates)} candidates, {len(frames)} frames, "
            f"{rounds} rounds (at least 2), {loads} loads, {warmup} warm-up rounds"
        )
    loads = min(loads, rounds) if all(isinstance(item, str | Path) for item in candidates.values()) else 1
    names = list(candidates)
    engines_ms: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    done = 0
    for load in range(loads):
        shift = load % len(names)
        runners = {name: _loaded(candidates[name], threads) for name in names[shift:] + names[:shift]}
        for runner in runners.values():
            runner.start(frames[0])
        for index in range(warmup + rounds // loads + (load < rounds % loads)):
            position = index % len(frames)
            first = index % len(names)
            for name in names[first:] + names[:first]:
                if position == 0:
                    runners[name].reset()
                output = runners[name].step(frames[position])
                if index >= warmup:
                    for engine, elapsed_ms in output.engines_ms.items():
                        engines_ms[name].setdefault(engine, []).append(elapsed_ms)
            done += 1
            if on_round:
                on_round(done, loads * warmup + rounds)
        del runners, runner
    return {name: LatencyStats.from_samples(engines_ms[name]) for name in names}


def _loaded(candidate: str | Path | Runner, threads: int) -> Runner:
    return load_runner(candidate, threads) if isinstance(candidate, str | Path) else candidate


def speedup(dense: LatencyStats, pruned: LatencyStats) -> float:
    """Median over rounds of dense / pruned, taken side by side: steadier than the ratio of two medians.

    Raises:
        DeploymentError: The two were not measured in the same rounds.
    """
    if dense.rounds != pruned.rounds:
        raise DeploymentError(f"{dense.rounds} rounds against {pruned.rounds}: measure both in one call")
    return statistics.median(a / b for a, b in zip(dense.samples_ms, pruned.samples_ms))


def session_device(threads: int = 1, precision: str = "float32") -> Device:
    """What a latency measured here depends on."""
    return Device(
        processor_name(),
        "onnxruntime-cpu",
        ort.__version__,
        threads,
        precision,
        system_name(),
        platform.python_version(),
    )
