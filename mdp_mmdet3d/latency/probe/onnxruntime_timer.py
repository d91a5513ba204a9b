"""Times operators with ONNX Runtime's profiler on the CPU, one thread. Stand-alone: Python >= 3.8."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

_NOT_MEASURED = ("source", "sink", "ReorderInput", "ReorderOutput")
_KERNEL = "_kernel_time"


class OnnxRuntimeTimer:
    """Measures small models whose tensors are named as in `mdp_mmdet3d.latency.graphs`.

    Runs go on until the fastest ones agree, and the fastest count, kernel by kernel, because another process on the
    machine only ever adds time. A session may be slow for as long as it lives, too: of several loads the fastest
    counts.

    Args:
        reference: Model of the reference operator (bytes or path) and the shapes of its inputs.
        loads: How often each operator is loaded into a session of its own.
        warmup: Runs of each load that are thrown away; the first two are slower than the rest.
        min_runs: Runs of a load that count at least.
        max_runs: Runs of a load at most.
        tolerance: Stop once the three fastest runs lie within this share of each other.
    """

    runtime = "onnxruntime-cpu"

    def __init__(
        self,
        reference: tuple[Any, dict[str, Any]],
        *,
        loads: int = 3,
        warmup: int = 2,
        min_runs: int = 4,
        max_runs: int = 16,
        tolerance: float = 0.03,
    ) -> None:
        if loads < 1 or warmup < 0 or not 1 <= min_runs <= max_runs or tolerance <= 0:
            raise ValueError(
                f"loads {loads}, warmup {warmup}, min_runs {min_runs}, max_runs {max_runs} and tolerance "
                f"{tolerance} must satisfy loads >= 1, warmup >= 0, 1 <= min_runs <= max_runs, "
                "tolerance > 0"
            )
        self._loads, self._warmup, self._tolerance = loads, warmup, tolerance
        self._min_runs, self._max_runs = min_runs, max_runs
        self._random = np.random.default_rng(0)
        self._reference, self._reference_feed = self._session(*reference)
        self._before = self.reference_ms(runs=4)

    def runtime_fields(self) -> dict[str, Any]:
        """The fields of a table's ``device`` that the runtime decides."""
        return {"runtime": self.runtime, "runtime_version": ort.__version__, "threads": 1, "precision": "float32"}

    def protocol(self) -> dict[str, Any]:
        """A table's ``protocol``."""
        return {
            "name": "kernel time in a sandwich",
            "warmup": self._warmup,
            "runs": self._min_runs,
            "statistic": f"fastest of {self._loads} loads: sum over kernels of the median of the fastest three",
            "staircase": True,
        }

    def reference_ms(self, runs: int = 2) -> float:
        """Fastest of a few runs of the reference operator: longer than usual while the machine is busy."""
        return min(self._run(self._reference, self._reference_feed) for _ in range(runs)) * 1000

    def measure(self, model: Any, inputs: dict[str, Any], copies: int) -> dict[str, Any]:
        """Measure one model (bytes or path).

        Args:
            model: Serialised model, or path of one.
            inputs: Shape per input.
            copies: How often the operator runs in it.

        Returns:
            ``ms``, ``spread``, ``runs`` and ``reference_ms`` of a table's entry.

        Raises:
            RuntimeError: ONNX Runtime refuses the model or does not profile it.
        """
        best = min((self._measure_load(model, inputs, copies) for _ in range(self._loads)), key=lambda load: load["ms"])
        after = self.reference_ms()
        busiest, self._before = max(self._before, after), after
        return dict(best, reference_ms=busiest)

    def _measure_load(self, model: Any, inputs: dict[str, Any], copies: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="mdp-latency-") as folder:
            session, feed = self._session(model, inputs, str(Path(folder) / "profile"))
            for _ in range(self._warmup):
                self._run(session, feed)
            walls: list[float] = []
            while len(walls) < self._min_runs or (len(walls) < self._max_runs and not self._settled(walls)):
                walls.append(self._run(session, feed))
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            del session
        kernels = measured_kernels(events, self._warmup, len(walls))
        ms = sum(sign * statistics.median(sorted(times)[:3]) for sign, times in kernels) / copies
        totals = [sum(sign * times[run] for sign, times in kernels) for run in range(len(walls))]
        return {
            "ms": max(ms, 0.0),
            "spread": (max(totals) - min(totals)) / abs(statistics.median(totals)),
            "runs": len(walls),
        }

    def _session(self, model: Any, inputs: dict[str, Any], profile: str | None = None) -> tuple[Any, dict[str, Any]]:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.set_denormal_as_zero", "1")  # as deployed
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        try:
            session = ort.InferenceSession(
                model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's errors have no base class of their own
            raise RuntimeError(f"ONNX Runtime {ort.__version__} refuses the model: {error}") from error
        return session, {
            name: self._random.standard_normal(tuple(shape), dtype=np.float32) for name, shape in inputs.items()
        }

    def _run(self, session: Any, feed: dict[str, Any]) -> float:
        start = time.perf_counter()
        try:
            session.run(None, feed)
        except Exception as error:  # ONNX Runtime's errors have no base class of their own
            raise RuntimeError(f"ONNX Runtime {ort.__version__} fails on the model: {error}") from error
        return time.perf_counter() - start

    def _settled(self, walls: list[float]) -> bool:
        fastest = sorted(walls)[:3]
        return fastest[-1] <= fastest[0] * (1 + self._tolerance)


def measured_kernels(events: list[dict[str, Any]], warmup: int, runs: int) -> list[tuple[int, list[float]]]:
    """Find the kernels of the measured operator in a profile.

    Args:
        events: What ONNX Runtime's profiler wrote.
        warmup: Runs to leave out.
        runs: Runs after them.

    Returns:
        Per kernel its sign (-1 for an offset) and its milliseconds in each run.

    Raises:
        RuntimeError: The profile does not hold every kernel once per run, or none of the operator.
    """
    durations: dict[str, list[float]] = {}
    for event in events:
        name = event.get("name", "")
        if name.endswith(_KERNEL) and not name.startswith(_NOT_MEASURED):
            durations.setdefault(name[: -len(_KERNEL)], []).append(event["dur"] / 1000)
    if not durations or any(len(times) != warmup + runs for times in durations.values()):
        found = {name: len(times) for name, times in durations.items()}
        raise RuntimeError(
            f"ONNX Runtime's profile holds {found or 'no'} runs of the operator's kernels, expected "
            f"{warmup + runs} of each; measure with an ONNX Runtime that profiles every kernel"
        )
    return [(-1 if name.startswith("offset") else 1, times[warmup:]) for name, times in durations.items()]
