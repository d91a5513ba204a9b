"""Latency in ``report.html``: where the milliseconds went, and what was predicted against what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from mdp_mmdet3d.report.html_inputs import RunFiles, plan_indices
from mdp_mmdet3d.solver.build import LATENCY


@dataclass(frozen=True)
class ModuleLatency:
    """Predicted milliseconds per frame of one module."""

    name: str
    dense_ms: float
    pruned_ms: float
    prunable: bool

    @property
    def saved_ms(self) -> float:
        """What pruning takes off."""
        return self.dense_ms - self.pruned_ms


@dataclass(frozen=True)
class Compared:
    """A network that was measured whole, beside its prediction."""

    name: str
    role: str
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted_ms / self.measured_ms - 1


def breakdown(files: RunFiles) -> list[ModuleLatency]:
    """Modules by falling dense latency, from ``breakdown_ms``; empty in reports that lack it."""
    rows = files.report.get("breakdown_ms") or {}
    dense, pruned = rows.get("dense", {}), rows.get("pruned", {})
    return [
        ModuleLatency(name, dense.get(name, 0.0), pruned.get(name, 0.0), not name.endswith(": not prunable"))
        for name in dict.fromkeys([*dense, *pruned])
    ]


def compared(files: RunFiles) -> list[Compared]:
    """Every network that was measured whole; predictions are of the model that the plan was made on.

    The networks of the fit and the pruned one refer to different sessions; the pruned one is given in the
    milliseconds of the fit's session (``session_drift``), as the budget of the search is.
    """
    report, problem = files.report, files.problem
    rows = []
    if not isinstance(files.networks, str) and not isinstance(problem, str):
        for index, network in enumerate(files.networks):
            try:
                plan = plan_indices(problem, network.widths, frozenset(network.removed))
            except ValueError:  # measured with other options of the space
                continue
            rows.append(
                Compared(
                    "dense" if index == 0 else f"network {index}",
                    "fit",
                    problem.evaluate(plan).costs[LATENCY],
                    sum(network.engines_ms.values()),
                )
            )
    drift = report.get("session_drift") or 1.0
    names = ("dense", "pruned") if not rows else ("pruned",)
    for name in names:
        if (measured_ms := report[name].get("latency_ms")) is not None:
            rows.append(Compared(name, "result", report[name]["predicted_ms"], measured_ms / drift))
    return rows
