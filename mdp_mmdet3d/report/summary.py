"""``report.json`` of a pruning job and the table that closes it."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from mdp_mmdet3d import __version__
from mdp_mmdet3d.deploy.macs import count_macs
from mdp_mmdet3d.deploy.measure import LatencyStats
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.solver.rerank import RankedSolution
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.plan import PruningPlan

SCHEMA_VERSION = 1
TRAINING_ONLY = ("img_roi_head.",)
FRAME_ENGINES = ("image_encoder.onnx", "head.onnx")


def model_figures(model: nn.Module, folder: Path, stats: LatencyStats, predicted_ms: float) -> dict[str, float]:
    """Size and speed of one exported model.

    Args:
        model: Dense or slim.
        folder: Its deployment folder.
        stats: Its measured latency.
        predicted_ms: What the latency table says.

    Returns:
        ``latency_ms`` (settled, end to end), ``median_ms``, ``p90_ms``, ``predicted_ms``, ``fps``, ``params``,
        ``macs`` (of the engines that run every frame).
    """
    return {
        "latency_ms": stats.settled_ms, "median_ms": stats.median_ms, "p90_ms": stats.p90_ms,
        "encoder_ms": stats.encoder_ms,
        "head_ms": stats.head_ms, "predicted_ms": predicted_ms, "fps": stats.fps,
        "params": sum(p.numel() for n, p in model.named_parameters() if not n.startswith(TRAINING_ONLY)),
        "macs": sum(count_macs(folder / engine) for engine in FRAME_ENGINES),
    }


def build_report(*, space: PruningSpace, importance: ImportanceTable, plan: PruningPlan, solution: RankedSolution,
                 figures: Mapping[str, Mapping[str, float]], seconds: Mapping[str, float],
                 **facts: Any) -> dict[str, Any]:
    """Put a run's results together.

    Args:
        space: What could be pruned.
        importance: What it was worth.
        plan: What stays.
        solution: Of the solver.
        figures: `model_figures` of ``"dense"`` and ``"pruned"``.
        seconds: Per stage.
        **facts: Further entries that are stored as they are.
    """
    result, problem = solution.result, solution.problem
    return {
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "model": space.model,
        **facts,
        **{name: dict(values) for name, values in figures.items()},
        "importance_kept": result.objective / problem.dense.value if problem.dense.value else 1.0,
        "importance_frames": importance.batches,
        "importance_skipped": importance.skipped,
        "solver": {**{k: v for k, v in result.to_json().items() if k not in ("options", "kept")},
                   "ranking_rounds": solution.rounds, "objective_first_ranking": solution.first_objective},
        "plan_hash": plan.hash,
        "removed_blocks": sorted(plan.removed),
        "widths": {d.name: [plan.width(d.name, d.size), d.size] for d in space.dimensions},
        "not_prunable": [{"module": n.module, "reason": n.reason} for n in space.not_prunable],
        "seconds": {**seconds, "total": sum(seconds.values())},
    }


def print_summary(report: Mapping[str, Any], console: Console) -> None:
    """The closing table."""
    table = Table(title=f"{report['model']} on {report['device']['cpu_model']}, ONNX Runtime "
                        f"{report['device']['onnxruntime']}, {report['device']['threads']} thread")
    for column in ("", "dense", "pruned", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    dense, pruned = report["dense"], report["pruned"]
    for name, key, scale, digits in (("latency, measured (ms)", "latency_ms", 1, 1),
                                     ("latency, predicted (ms)", "predicted_ms", 1, 1), ("FPS", "fps", 1, 2),
                                     ("parameters (M)", "params", 1e-6, 2), ("MACs per frame (G)", "macs", 1e-9, 2)):
        a, b = dense[key] * scale, pruned[key] * scale
        table.add_row(name, f"{a:.{digits}f}", f"{b:.{digits}f}", f"{b / a:.3f}")
    console.print(table)
    solver = report["solver"]
    console.print(f"budget {report['budget']} = {report['budget_ms']:.1f} ms; speed-up {report['speedup']:.2f}x "
                  f"(side by side); not prunable {report['not_prunable_ms']:.1f} ms "
                  f"({report['not_prunable_ms'] / dense['predicted_ms']:.1%} of dense), "
                  f"smallest reachable {solver['minimum']['latency_ms']:.1f} ms")
    console.print(f"solver {solver['status']}, gap {solver['gap']:.1e}; importance kept "
                  f"{report['importance_kept']:.1%}; {len(report['removed_blocks'])} blocks removed; "
                  f"{report['interpolated_entries']} interpolated table entries; plan {report['plan_hash']}")
    worst = report["differences"]["pruned"]
    console.print(f"ONNX Runtime against PyTorch (pruned): logits {worst['logits']:.1e}, boxes {worst['boxes']:.1e}")
    if report["weights"] == "random":
        console.print("[bold red]weights: random[/bold red]: the line works; accuracy means nothing")
