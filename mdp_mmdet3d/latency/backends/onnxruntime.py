"""ONNX Runtime on the CPU: kernel times from its profiler, one thread."""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import onnxruntime as ort

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.latency.backends.host import processor_name, system_name
from mdp_mmdet3d.latency.graphs import OperatorGraph, operator_graph
from mdp_mmdet3d.latency.sampling import Point
from mdp_mmdet3d.latency.table import Device, Entry, MeasurementProtocol
from mdp_mmdet3d.space import OperatorSignature

Feed = dict[str, np.ndarray]
Kernel = tuple[int, list[float]]

_NOT_MEASURED = ("source", "sink", "ReorderInput", "ReorderOutput")
_KERNEL = "_kernel_time"
# A few milliseconds of dense arithmetic: slows down as soon as anything else uses the core or its twin.
_REFERENCE = OperatorSignature.make(
    "conv",
    batch=1,
    height=32,
    width=88,
    kernel_h=3,
    kernel_w=3,
    stride=1,
    padding=1,
    groups=1,
    relu=True,
    residual=False,
)
_REFERENCE_WIDTHS = (128, 128)


class OnnxRuntimeBackend:
    """Times operators by ONNX Runtime's profiler in a context like the network's (``docs/latency.md``).

    Runs go on until the fastest ones agree, and the fastest count, kernel by kernel, because another process on the
    machine only ever adds time.

    Args:
        warmup: Runs of each operator that are thrown away; the first two are slower than the rest.
        min_runs: Runs that count at least.
        max_runs: Runs at most.
        tolerance: Stop once the three fastest runs lie within this share of each other.
    """

    def __init__(self, *, warmup: int = 2, min_runs: int = 4, max_runs: int = 16, tolerance: float = 0.03) -> None:
        if warmup < 0 or not 1 <= min_runs <= max_runs or tolerance <= 0:
            raise ValueError(
                f"warmup {warmup}, min_runs {min_runs}, max_runs {max_runs} and tolerance {tolerance} "
                "must satisfy warmup >= 0, 1 <= min_runs <= max_runs, tolerance > 0"
            )
        self.protocol = MeasurementProtocol(
            "kernel time in a sandwich",
            warmup,
            min_runs,
            "sum over kernels of the median of the fastest three",
            staircase=True,
        )
        self._max_runs = max_runs
        self._tolerance = tolerance
        self._random = np.random.default_rng(0)

    def fingerprint(self) -> Device:
        """Describe this machine and its ONNX Runtime."""
        return Device(
            processor_name(),
            "onnxruntime-cpu",
            ort.__version__,
            threads=1,
            precision="float32",
            system=system_name(),
            python=platform.python_version(),
        )

    def measure(self, points: Iterable[Point]) -> Iterator[tuple[Point, Entry]]:
        """Measure each point in its own session, which is freed before the next one starts.

        Raises:
            MdpError: ONNX Runtime refuses an operator.
        """
        reference = self._session(operator_graph(_REFERENCE, _REFERENCE_WIDTHS))
        before = self._reference_ms(*reference, runs=4)
        for signature, widths in points:
            entry = self._measure(signature, widths)
            after = self._reference_ms(*reference, runs=2)
            yield (signature, widths), replace(entry, reference_ms=max(before, after))
            before = after

    def _measure(self, signature: OperatorSignature, widths: tuple[int, ...]) -> Entry:
        graph = operator_graph(signature, widths)
        try:
            with tempfile.TemporaryDirectory(prefix="mdp-latency-") as folder:
                kernels = self._kernel_ms(graph, folder)
        except ort.capi.onnxruntime_pybind11_state.OnnxRuntimeException as error:
            raise MdpError(
                f"ONNX Runtime {ort.__version__} cannot run {signature.key} with widths {widths}: {error}"
            ) from error
        ms = sum(sign * statistics.median(sorted(times)[:3]) for sign, times in kernels) / graph.copies
        totals = [sum(sign * times[run] for sign, times in kernels) for run in range(len(kernels[0][1]))]
        spread = (max(totals) - min(totals)) / abs(statistics.median(totals))
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        return Entry(max(ms, 0.0), spread, len(totals), now)

    def _session(self, graph: OperatorGraph, profile: Path | None = None) -> tuple[ort.InferenceSession, Feed]:
        """A session on one thread, with its inputs; it profiles into ``profile``."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        session = ort.InferenceSession(graph.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = {name: self._random.standard_normal(shape, dtype=np.float32) for name, shape in graph.inputs.items()}
        return session, feed

    def _reference_ms(self, session: ort.InferenceSession, feed: Feed, runs: int) -> float:
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            session.run(None, feed)
            times.append((time.perf_counter() - start) * 1000)
        return min(times)

    def _kernel_ms(self, graph: OperatorGraph, folder: str) -> list[Kernel]:
        """The measured kernels of all runs that count."""
        session, feed = self._session(graph, Path(folder) / "profile")
        for _ in range(self.protocol.warmup):
            session.run(None, feed)
        walls: list[float] = []
        while len(walls) < self.protocol.runs or (len(walls) < self._max_runs and not self._settled(walls)):
            start = time.perf_counter()
            session.run(None, feed)
            walls.append(time.perf_counter() - start)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return measured_kernels(events, self.protocol.warmup, len(walls))

    def _settled(self, walls: list[float]) -> bool:
        fastest = sorted(walls)[:3]
        return fastest[-1] <= fastest[0] * (1 + self._tolerance)


def measured_kernels(events: list[dict], warmup: int, runs: int) -> list[Kernel]:
    """Find the kernels of the measured operator in a profile.

    Args:
        events: What ONNX Runtime's profiler wrote.
        warmup: Runs to leave out.
        runs: Runs after them.

    Returns:
        Per kernel its sign (-1 for an offset) and its milliseconds in each run.

    Raises:
        MdpError: The profile does not hold every kernel once per run, or none of the operator.
    """
    durations: dict[str, list[float]] = {}
    for event in events:
        name = event.get("name", "")
        if name.endswith(_KERNEL) and not name.startswith(_NOT_MEASURED):
            durations.setdefault(name, []).append(event["dur"] / 1000)
    if not durations or any(len(times) != warmup + runs for times in durations.values()):
        found = {name.removesuffix(_KERNEL): len(times) for name, times in durations.items()}
        raise MdpError(
            f"ONNX Runtime's profile holds {found or 'no'} runs of the operator's kernels, expected {warmup + runs} "
            "of each; measure with an ONNX Runtime that profiles every kernel"
        )
    return [(-1 if name.startswith("offset") else 1, times[warmup:]) for name, times in durations.items()]
