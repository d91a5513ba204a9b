"""Does this machine run this deployment at the required rate? Measured over a stream, not predicted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime.host import resident_mib
from mdp_mmdet3d.runtime.load import Runner

SCHEMA_VERSION = 1
MOST_FRAMES = 1_000_000
ENGINES_KEYS = ("engines_p50_ms", "engines_settled_ms")
"""Names of the median and of the `settled` time of all engines of a frame together; tables predict the latter."""

MEMORY_SLACK_MIB = 64.0
"""Growth of the resident memory that allocators cause; more is reported as a leak."""


@dataclass(frozen=True)
class Requirement:
    """What the vehicle needs.

    Attributes:
        fps: Frames per second.
        deadline_ms: Latest end of a frame after its start.
        allowed_misses: Share of frames that may be later.
    """

    fps: float
    deadline_ms: float
    allowed_misses: float = 0.01

    def __post_init__(self) -> None:
        finite = np.isfinite([self.fps, self.deadline_ms]).all()
        if not (finite and self.fps > 0 and self.deadline_ms > 0 and 0 <= self.allowed_misses < 1):
            raise DeploymentError(
                f"fps={self.fps} and deadline_ms={self.deadline_ms} must be positive, "
                f"allowed_misses={self.allowed_misses} in 0..1"
            )


@dataclass(frozen=True)
class Candidate:
    """Latencies of one deployment, every frame in the order of the stream.

    Attributes:
        engines_ms: Of every engine, host work on the memory included.
        frame_ms: From the network input in memory to decoded boxes, without `rig_ms`.
        rig_ms: What is computed again only because the camera rig changed (`Runner.start`).
    """

    engines_ms: dict[str, list[float]] = field(default_factory=dict)
    frame_ms: list[float] = field(default_factory=list)
    rig_ms: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Percentiles in milliseconds, throughput in frames per second of back-to-back frames, jitter."""
        values = np.array(self.frame_ms)
        p50, p90, p99 = np.percentile(values, [50, 90, 99])
        return {
            "p50_ms": float(p50),
            "p90_ms": float(p90),
            "p99_ms": float(p99),
            "max_ms": float(values.max()),
            "min_ms": float(values.min()),
            "mean_ms": float(values.mean()),
            "jitter_ms": float(values.std()),
            "largest_step_ms": float(np.abs(np.diff(values)).max()) if len(values) > 1 else 0.0,
            **{engine_key(name): float(np.median(times)) for name, times in self.engines_ms.items()},
            **self._engines_together(),
            "throughput_fps": float(1e3 / values.mean()),
        }

    def _engines_together(self) -> dict[str, float]:
        together = np.sum(list(self.engines_ms.values()), axis=0).tolist()
        return dict(zip(ENGINES_KEYS, (float(np.median(together)), settled(together))))


def settled(samples_ms: Sequence[float]) -> float:
    """Median of the fastest quarter, of the fastest three at least: what is taken while nothing else runs."""
    return statistics.median(sorted(samples_ms)[: max(3, len(samples_ms) // 4)])


def engine_key(engine: str) -> str:
    """Name of an engine's median in ``fps.json``: ``encoder_p50_ms``, ``head_p50_ms``, ``model_p50_ms``."""
    name = engine[len("image_") :] if engine.startswith("image_") else engine
    return f"{name}_p50_ms"


@dataclass(frozen=True)
class Validation:
    """Result of `validate`.

    Attributes:
        requirement: What was asked for.
        latency: Of the deployment.
        dense_latency: Of the dense baseline, which ran the same frames in turn; None without one.
        speedup: Median over frames of dense / deployment, side by side; None without a baseline.
        deadline_misses: Frames that ended late.
        memory_mib: ``start``, ``end`` and ``peak`` of the process, both deployments together.
        gpu_memory_mib: The same of the GPU, all processes together; None without one.
        rig: In how many timed frames the camera rig changed (``changes``), and the median of what the deployment
            computed for that (``p50_ms``), which is in no latency; None if it never did.
        failures: Requirements that are missed, in words; empty if all are met.
        samples_ms: Frame latencies in the order of the stream.
    """

    requirement: Requirement
    latency: dict[str, float]
    dense_latency: dict[str, float] | None
    speedup: float | None
    deadline_misses: int
    memory_mib: dict[str, float]
    failures: tuple[str, ...]
    samples_ms: tuple[float, ...]
    gpu_memory_mib: dict[str, float] | None = None
    rig: dict[str, float] | None = None

    @property
    def met(self) -> bool:
        """Whether every requirement is met."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Content of ``fps.json``."""
        return {"schema_version": SCHEMA_VERSION, "met": self.met, **asdict(self)}


def validate(
    runner: Runner,
    frames: Iterator[Any],
    count: int,
    requirement: Requirement,
    *,
    warmup: int = 10,
    dense: Runner | None = None,
    on_frame: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Validation:
    """Stream frames synchronously, one after the other, and time each from network input to decoded boxes.

    What a vehicle computes once, the position embedding of its rig, is timed apart where a recorded drive has another
    rig in every frame, as nuScenes has. Frames are taken from the iterator between the timed parts.

    Args:
        runner: The deployment.
        frames: At least ``warmup + count`` frames; scenes may change.
        count: Timed frames, 2 to `MOST_FRAMES`.
        requirement: What the vehicle needs.
        warmup: Frames before them that are not timed.
        dense: Baseline that runs every frame too; who goes first alternates.
        on_frame: Called with (frames done, frames in all).
        clock: Seconds, monotonic.

    Raises:
        DeploymentError: Too few frames, or a frame that the runner refuses.
    """
    check_counts(count, warmup)
    candidates = [(runner, Candidate())] + ([(dense, Candidate())] if dense is not None else [])
    for item, _ in candidates:
        item.reset()
    memory, gpu = _Memory(resident_mib), _Memory(runner.gpu_used_mib)
    for index in range(warmup + count):
        frame = next(frames, None)
        if frame is None:
            raise DeploymentError(f"the stream ended after {index} frames; {warmup + count} were asked for")
        if index == warmup:
            memory.start()
            gpu.start()
        for item, found in candidates if index % 2 == 0 else candidates[::-1]:
            start = clock()
            changed = item.start(frame)
            ready = clock()
            output = item.step(frame)
            item.decode(output)
            elapsed_ms = 1e3 * (clock() - ready)
            if index >= warmup:
                found.frame_ms.append(elapsed_ms)
                if changed:
                    found.rig_ms.append(1e3 * (ready - start))
                for name, engine_ms in output.engines_ms.items():
                    found.engines_ms.setdefault(name, []).append(engine_ms)
        if index >= warmup:
            memory.update()
            gpu.update()
        if on_frame:
            on_frame(index + 1, warmup + count)
    samples = candidates[0][1].frame_ms
    dense_samples = candidates[1][1].frame_ms if dense is not None else None
    latency = candidates[0][1].summary()
    rig_ms = candidates[0][1].rig_ms
    misses = sum(value > requirement.deadline_ms for value in samples)
    return Validation(
        requirement=requirement,
        latency=latency,
        dense_latency=candidates[1][1].summary() if dense is not None else None,
        speedup=float(np.median(np.array(dense_samples) / samples)) if dense_samples else None,
        deadline_misses=misses,
        memory_mib=memory.values,
        failures=tuple(judge(requirement, latency["throughput_fps"], misses / len(samples), memory.values)),
        samples_ms=tuple(samples),
        gpu_memory_mib=gpu.values or None,
        rig={"changes": len(rig_ms), "p50_ms": float(np.median(rig_ms))} if rig_ms else None,
    )


def check_counts(count: int, warmup: int) -> None:
    """Raise `DeploymentError` unless so many frames can be timed."""
    if not (2 <= count <= MOST_FRAMES and 0 <= warmup <= MOST_FRAMES):
        raise DeploymentError(f"{count} timed frames must be in 2..{MOST_FRAMES}, {warmup} warm-up frames in 0..")


class _Memory:
    """Start, end and peak of a figure in MiB; empty where it cannot be read."""

    def __init__(self, read: Callable[[], float | None]) -> None:
        self._read = read
        self.values: dict[str, float] = {}

    def start(self) -> None:
        now = self._read()
        self.values = {} if now is None else {"start": now, "end": now, "peak": now}

    def update(self) -> None:
        if self.values:
            now = self._read() or 0.0
            self.values.update(end=now, peak=max(self.values["peak"], now))


def judge(requirement: Requirement, fps: float, miss_share: float, memory_mib: dict[str, float]) -> Sequence[str]:
    """Requirements that these figures miss, in words."""
    failures = []
    if fps < requirement.fps:
        failures.append(f"{fps:.1f} FPS, {requirement.fps:g} are required")
    if miss_share > requirement.allowed_misses:
        failures.append(
            f"{miss_share:.1%} of the frames are later than {requirement.deadline_ms:g} ms, "
            f"{requirement.allowed_misses:.1%} may be"
        )
    growth = memory_mib["end"] - memory_mib["start"]
    if growth > MEMORY_SLACK_MIB:
        failures.append(f"memory grew by {growth:.0f} MiB during the run: a leak")
    return failures
