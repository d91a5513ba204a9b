"""Picture of a latency trace."""

from __future__ import annotations

import warnings
from pathlib import Path

from matplotlib.figure import Figure

from mdp_mmdet3d.files import atomic_path
from mdp_mmdet3d.runtime.validate import Validation


def plot_trace(path: str | Path, result: Validation) -> None:
    """Draw latency over frames with deadline and percentiles, and its distribution; format by the suffix.

    Args:
        path: ``.png``, ``.svg`` or ``.pdf``.
        result: What `validate` returned.
    """
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    trace, histogram = figure.subplots(1, 2, width_ratios=(4, 1), sharey=True)
    trace.plot(result.samples_ms, linewidth=0.6)
    deadline_ms = result.requirement.deadline_ms
    trace.axhline(deadline_ms, color="tab:red", label=f"deadline {deadline_ms:.1f} ms")
    for key, style in (("p50_ms", "-"), ("p99_ms", "--")):
        value = result.latency[key]
        trace.axhline(value, color="black", linestyle=style, linewidth=0.8, label=f"{key[:3]} {value:.1f} ms")
    trace.set(xlabel="frame", ylabel="latency in ms", ylim=(0, None))
    trace.legend(loc="upper right")
    histogram.hist(result.samples_ms, bins=50, orientation="horizontal")
    histogram.set(xlabel="frames")
    with atomic_path(path) as temporary, warnings.catch_warnings():
        # Engines run with subnormal numbers flushed to 0; numpy notices when matplotlib asks for the limits of a float.
        warnings.filterwarnings("ignore", "The value of the smallest subnormal", UserWarning)
        figure.savefig(temporary)
