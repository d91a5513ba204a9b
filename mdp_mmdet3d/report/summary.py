"""``report.json`` of a pruning job and the table that closes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from mdp_mmdet3d import __version__
from mdp_mmdet3d.device import Device
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.latency.coverage import coverage_line, is_low
from mdp_mmdet3d.onnx.macs import count_macs
from mdp_mmdet3d.runtime.measure import LatencyStats
from mdp_mmdet3d.solver.rerank import RankedSolution
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.plan import PruningPlan

SCHEMA_VERSION = 1


def decimals(latency_ms: float) -> int:
    """How many decimals of milliseconds tell two latencies of this size apart."""
    return 1 if latency_ms >= 1 else 3


def model_figures(
    model: nn.Module,
    engines: Sequence[Path],
    stats: LatencyStats | None,
    predicted_ms: float,
    training_only: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Size and speed of one exported model.

    Args:
        model: Dense or pruned.
        engines: ONNX files of the engines that run every frame.
        stats: Its measured latency; None if it was not measured, as for another device.
        predicted_ms: What the latency table says.
        training_only: Prefixes of parameters that are not deployed.

    Returns:
        ``latency_ms`` (settled, end to end), ``median_ms``, ``p90_ms``, ``engines_ms`` (by name), ``predicted_ms``,
        ``fps``, ``params``, ``macs`` (of the engines that run every frame). What was not measured is None; ``fps`` is
        predicted then.
    """
    return {
        "latency_ms": stats and stats.settled_ms,
        "median_ms": stats and stats.median_ms,
        "p90_ms": stats and stats.p90_ms,
        "engines_ms": stats and dict(stats.engines_ms),
        "predicted_ms": predicted_ms,
        "fps": stats.fps if stats else 1e3 / predicted_ms,
        "params": sum(p.numel() for n, p in model.named_parameters() if not n.startswith(training_only)),
        "macs": sum(count_macs(engine) for engine in engines),
    }


def build_report(
    *,
    space: PruningSpace,
    importance: ImportanceTable,
    plan: PruningPlan,
    solution: RankedSolution,
    figures: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float],
    **facts: Any,
) -> dict[str, Any]:
    """Put a run's results together.

    Args:
        space: What could be pruned.
        importance: What it was worth.
        plan: What stays.
        solution: Of the solver.
        figures: `model_figures` of ``"dense"`` and ``"pruned"``.
        seconds: Per step.
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
        "solver": {
            **{k: v for k, v in result.to_json().items() if k not in ("options", "kept")},
            "ranking_rounds": solution.rounds,
            "objective_first_ranking": solution.first_objective,
        },
        "plan_hash": plan.hash,
        "removed_blocks": sorted(plan.removed),
        "widths": {d.name: [plan.width(d.name, d.size), d.size] for d in space.dimensions},
        "not_prunable": [{"module": n.module, "reason": n.reason} for n in space.not_prunable],
        "seconds": {**seconds, "total": sum(seconds.values())},
    }


def print_summary(report: Mapping[str, Any], console: Console) -> None:
    """The closing table."""
    measured = report["measured_end_to_end"]
    table = Table(title=f"{report['model']} on {Device(**report['device'])}")
    for column in ("", "dense", "pruned", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    dense, pruned = report["dense"], report["pruned"]
    ms_digits = decimals(report["budget_ms"]) if measured else 3
    for name, key, scale, digits in (
        ("latency, measured (ms)", "latency_ms", 1, ms_digits),
        ("latency, predicted (ms)", "predicted_ms", 1, ms_digits),
        ("FPS" if measured else "FPS, predicted", "fps", 1, 2),
        ("parameters (M)", "params", 1e-6, 2),
        ("MACs per frame (G)", "macs", 1e-9, 2),
    ):
        if dense[key] is not None:
            a, b = dense[key] * scale, pruned[key] * scale
            table.add_row(name, f"{a:.{digits}f}", f"{b:.{digits}f}", f"{b / a:.3f}")
    console.print(table)
    solver = report["solver"]
    speedup = (
        f"speed-up {report['speedup']:.2f}x (side by side)"
        if measured
        else (f"speed-up {dense['predicted_ms'] / pruned['predicted_ms']:.2f}x (predicted)")
    )
    console.print(
        f"budget {report['budget']} = {report['budget_ms']:.{ms_digits}f} ms; {speedup}; "
        f"not prunable {report['not_prunable_ms']:.{ms_digits}f} ms "
        f"({report['not_prunable_ms'] / dense['predicted_ms']:.1%} of dense), "
        f"smallest reachable {solver['minimum']['latency_ms']:.{ms_digits}f} ms"
    )
    for entry in report.get("coverage", ()):
        console.print(coverage_line(entry), style="yellow" if is_low(entry) else None, highlight=False)
    console.print(
        f"solver {solver['status']}, gap {solver['gap']:.1e}; {_worth(report)}; "
        f"{len(report['removed_blocks'])} blocks removed; "
        f"{report['interpolated_entries']} interpolated table entries; plan {report['plan_hash']}"
    )
    if "accuracy" in report:
        console.print(_accuracy_table(report))
    worst = report["differences"]["pruned"]
    figures = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    console.print(f"ONNX Runtime against PyTorch (pruned): {figures}")
    if report["weights"] == "random":
        console.print("[bold red]weights: random[/bold red]: the line works; accuracy means nothing")


def print_target_steps(report: Mapping[str, Any], config: str, work_dir: Path, console: Console) -> None:
    """What is left to do on the device that a plan was made for."""
    table = report["latency_table"]
    device = Device(**report["device"])
    console.print(
        f"[bold]End-to-end latency on {device} is a prediction[/bold] ({'; '.join(report['latency_model'])})."
        " To do on that device:",
        highlight=False,
    )
    if report["device"]["runtime"] == "roofline":
        console.print("- measure: the table is an estimate from peak figures, no measurement", highlight=False)
    if report["interpolated"]:
        console.print(f"- {len(report['interpolated'])} table entries of this plan are interpolated:", highlight=False)
        for entry in report["interpolated"]:
            console.print(f"    {entry['operator']} {entry['widths']}", highlight=False, markup=False)
        console.print(
            f"  measure exactly these: tools/profile_latency.py {config} --bundle more.zip --plan "
            f"{work_dir}/plan.json --lacking {table['path']}, run it there, then tools/profile_latency.py "
            f"merge {table['path']} more.json, and prune again",
            highlight=False,
            markup=False,
        )
    float32 = report["device"]["precision"] == "float32"
    precision = "" if float32 else ", both exported in that precision (tools/export.py)"
    console.print(
        f"- validate: copy {work_dir}/onnx there and run python mdp_runtime.pyz validate_fps pruned --dense dense "
        f"--fps N --json fps.json in it{precision}; --target-latency fps.json corrects the next run by it",
        highlight=False,
        markup=False,
    )


def _worth(report: Mapping[str, Any]) -> str:
    """What the plan keeps or loses."""
    if "values" not in report:
        return f"importance kept {report['importance_kept']:.1%}"
    values = report["values"]
    return (
        f"loss {values['dense_loss']:.3f}, without training {values['predicted']:+.3f} predicted, "
        f"{values['measured']:+.3f} +- {values['error']:.3f} measured with batch norms re-estimated, "
        f"{values['delivered']:+.3f} as delivered"
    )


def _accuracy_table(report: Mapping[str, Any]) -> Table:
    """Accuracy beside latency; fine-tuning changes weights only, so the fine-tuned model runs as fast as the pruned."""
    table = Table(title="accuracy on the test data")
    metrics = list(dict.fromkeys(metric for figures in report["accuracy"].values() for metric in figures))
    for column in ("", *metrics, "latency (ms)"):
        table.add_column(column, justify="left" if not column else "right")
    names = {"repaired": "pruned, repaired", "finetuned": "pruned, fine-tuned"}
    for name, figures in report["accuracy"].items():
        latency_ms = report["dense" if name == "dense" else "pruned"].get("latency_ms")
        table.add_row(
            names.get(name, name),
            *(f"{figures[metric]:.3f}" if metric in figures else "" for metric in metrics),
            "" if latency_ms is None else f"{latency_ms:.{decimals(latency_ms)}f}",
        )
    return table
