"""What a pruning job comes to: its steps' times, the plan with its measurements, the report about both models."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from mdp_mmdet3d.adapters import Adapter
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.latency.coverage import coverage
from mdp_mmdet3d.report.summary import build_report, model_figures
from mdp_mmdet3d.runner.optimise import PlanSearch
from mdp_mmdet3d.runner.settings import parse_budget
from mdp_mmdet3d.runner.steps import frame_engine_files
from mdp_mmdet3d.runtime.measure import LatencyStats, session_device, speedup
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.plan import PruningPlan

# What each step does, for who reads the log.
ABOUT = {
    "model": "build it, load its weights, read frames of the data",
    "pruning space": "trace what can be cut",
    "importance": "gradients of the training loss over frames of the data",
    "loss changes": "the training loss with one part cut, part after part",
    "export dense": "ONNX graphs of the model as it is",
    "whole networks": "dense and a few pruned networks, measured end to end",
    "latency table": "every operator at every width, measured by itself",
    "latency model of the target": "predictions from its table",
    "solve": "the best plan within the budget, solved again when what it uses was measured",
    "cut and export": "build the pruned model, write its weights and ONNX graphs",
    "measure": "dense and pruned model end to end, in turns",
    "repair": "refit the layers that are left to what the dense model computes, write and export them",
    "check": "ONNX graphs against PyTorch, on frames of the data",
    "fine-tune": "train the pruned model",
    "report": "solve for other budgets, write report.html",
}


class Steps:
    """Announces the steps, says how long they took and keeps their times."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, about: str = "") -> Iterator[None]:
        """Time the block under ``name``; ``about`` says what it does where `ABOUT` does not."""
        about = about or ABOUT.get(name, "")
        self.console.print(f"[bold]{name}[/bold]" + (f": {about}" if about else ""), highlight=False)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.console.print(f"  took {seconds:.1f} s", style="dim", highlight=False)


@dataclass(frozen=True)
class Pruned:
    """What either way of pruning comes to.

    Attributes:
        search: With the latency model that the plan was made on.
        plan: What stays.
        model: The pruned model.
        stats: Latency of ``"dense"`` and ``"pruned"`` on this machine; None if the plan is for another device.
        drift: Dense latency of this session relative to the one that the budget refers to.
    """

    search: PlanSearch
    plan: PruningPlan
    model: nn.Module
    stats: dict[str, LatencyStats] | None = None
    drift: float = 1.0

    @property
    def share(self) -> float:
        """Of the dense latency, as predicted."""
        return self.search.predicted_ms / self.search.dense_predicted_ms


def job_report(
    adapter: Adapter,
    space: PruningSpace,
    importance: ImportanceTable,
    found: Pruned,
    *,
    dense: nn.Module,
    work_dir: Path,
    budget: float | str,
    differences: Mapping[str, Mapping[str, float]],
    weights: str,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """What a job says about the models themselves: `build_report` with figures of the dense and the pruned one.

    Args:
        adapter: Of the models.
        space: What could be pruned.
        importance: What ranked the elements.
        found: Plan, pruned model and measurements.
        dense: The dense model.
        work_dir: With ``onnx/dense`` and ``onnx/pruned``.
        budget: As the user gave it.
        differences: Of ONNX Runtime from PyTorch, per model.
        weights: Where they came from.
        seconds: Per step.
    """
    search, stats = found.search, found.stats
    # A share of the dense latency means the dense latency of this session.
    relative = parse_budget(budget)[1] == "share"
    figures = {
        name: model_figures(
            model,
            frame_engine_files(work_dir / "onnx" / name, adapter.once),
            stats[name] if stats else None,
            predicted,
            adapter.training_only,
        )
        for name, model, predicted in (
            ("dense", dense, search.dense_predicted_ms),
            ("pruned", found.model, search.predicted_ms),
        )
    }
    interpolated = search.interpolated_entries
    device = search.latency.table.device
    return build_report(
        space=space,
        importance=importance,
        plan=found.plan,
        solution=search.solution,
        figures=figures,
        budget=budget,
        budget_ms=search.budget_ms * (found.drift if relative else 1.0),
        reference_budget_ms=search.budget_ms,
        session_drift=found.drift,
        measured_end_to_end=stats is not None,
        speedup=speedup(stats["dense"], stats["pruned"]) if stats else None,
        not_prunable_ms=search.latency.total_fixed_ms,
        interpolated_entries=len(interpolated),
        interpolated=[{"operator": signature.key, "widths": list(widths)} for signature, widths in interpolated],
        corrections=search.corrections,
        fitted_networks=len(search.latency.networks),
        latency_model=[*search.latency.explanation, *(f"warning: {text}" for text in search.latency.doubts)],
        breakdown_ms=search.breakdown(),
        coverage=[entry.to_json() for entry in coverage(search.latency)],
        differences={name: dict(values) for name, values in differences.items()},
        weights=weights,
        device=asdict(session_device() if stats else device),
        latency_table=search.provenance.get("latency_table"),
        seconds=dict(seconds),
    )
