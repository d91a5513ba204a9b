"""What a comparison found: figures over seeds, the distance of MDP from the others, a table, a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mdp_mmdet3d.compare.methods import METHODS
from mdp_mmdet3d.files import atomic_path, read_json

ACCURACY_VERSION = 1
EQUAL = 0.05  # relative difference of latency up to which accuracies are set against each other
STAGES = {"cut": "after the cut", "repaired": "after repair", "finetuned": "after fine-tuning"}
LOOKS = {
    "mdp": ("#1a66b8", "o"),
    "halp": ("#c8743c", "s"),
    "uniform": ("#777777", "^"),
    "magnitude": ("#4c9a5b", "D"),
    "torch-pruning": ("#8a5bb5", "v"),
    "mdp-taylor": ("#5fa8e8", "o"),
    "mdp-channels": ("#b8a13c", "<"),
    "mdp-linear": ("#3ca8a8", ">"),
    "mdp-channels-linear": ("#b85a8c", "P"),
}  # colour and marker in plots


def summary(results: Sequence[Path]) -> dict[str, Any]:
    """Figures of runs that differ in their seed: each, mean, standard deviation, spread (largest - smallest)."""
    content = [read_json(path, what="accuracy", schema_version=ACCURACY_VERSION) for path in results]
    out: dict[str, Any] = {}
    for figure in content[0]["figures"]:
        values = [item["figures"][figure] for item in content]
        out[figure] = {
            "runs": values,
            "mean": statistics.mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "spread": max(values) - min(values),
        }
    return out


def last_stage(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """Figures of a model as it would be delivered: fine-tuned, else repaired, else as it was cut."""
    return next(item[stage] for stage in reversed(STAGES) if stage in item)


def verdicts(report: Mapping[str, Any]) -> dict[str, Any]:
    """How far MDP is ahead of each other method in the first figure, and of the dense model; empty without MDP.

    ``spread`` is the larger one of MDP's and the dense model's seeds. Methods whose plan is not as fast as MDP's
    are not compared: ``other_latency`` has their measured shares.
    """
    figure = next(iter(last_stage(report["dense"])))
    dense = last_stage(report["dense"])[figure]
    out: dict[str, Any] = {}
    for budget, methods in report["budgets"].items():
        if "mdp" not in methods:
            continue
        means = {name: last_stage(item)[figure]["mean"] for name, item in methods.items()}
        shares = {name: item["measured_share"] for name, item in methods.items()}
        unequal = {name: share for name, share in shares.items() if abs(share / shares["mdp"] - 1) > EQUAL}
        mdp, spread = means["mdp"], max(last_stage(methods["mdp"])[figure]["spread"], dense["spread"])
        out[budget] = {
            **{f"mdp_minus_{n}": mdp - mean for n, mean in means.items() if n != "mdp" and n not in unequal},
            **({"other_latency": unequal} if unequal else {}),
            "mdp_minus_dense": mdp - dense["mean"],
            "spread": spread,
            "not_below_dense_by_more_than_the_spread": mdp - dense["mean"] >= -spread,
        }
    return out


def markdown(report: Mapping[str, Any]) -> str:
    """The table, and a line per budget with the verdicts."""
    rows = [("1", "dense", report["dense"])]
    rows += [(b, METHODS[name].title, item) for b, found in report["budgets"].items() for name, item in found.items()]
    figures = list(report["dense"]["cut"])
    stages = [stage for stage in STAGES if any(stage in item for _, _, item in rows)]
    head = ["budget", "method", "latency ms", "measured share", "params M", "MMACs", "removed blocks"]
    head += [f"{figure} {STAGES[stage]}" for stage in stages for figure in figures]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for budget, title, item in rows:
        cells = [budget, title, f"{item['latency_ms']:.3g}", f"{item['measured_share']:.3f}"]
        cells += [f"{item['params'] / 1e6:.3f}", f"{item['macs'] / 1e6:.1f}", str(len(item.get("removed_blocks", ())))]
        cells += [_cell(item.get(stage), figure) for stage in stages for figure in figures]
        lines.append("| " + " | ".join(cells) + " |")
    for budget, verdict in report["verdicts"].items():
        parts = [
            f"{key.replace('_', ' ')} {str(value).lower() if isinstance(value, bool) else format(value, '+.3f')}"
            for key, value in verdict.items()
            if key != "other_latency"
        ]
        lines += ["", f"{budget}: {', '.join(parts)}"]
        if unequal := verdict.get("other_latency"):
            shares = ", ".join(f"{METHODS[name].title} {share:.3f}" for name, share in unequal.items())
            own = report["budgets"][budget]["mdp"]["measured_share"]
            lines += ["", f"{budget}: not compared, since they are not as fast as MDP's {own:.3f}: {shares}"]
    for budget, methods in report.get("without_plan", {}).items():
        lines += ["", *(f"{budget}: {METHODS[name].title}: {reason}" for name, reason in methods.items())]
    return "\n".join(lines)


def _cell(figures: Mapping[str, Any] | None, figure: str) -> str:
    if figures is None:
        return ""
    found = figures[figure]
    return f"{found['mean']:.3f}" + (f" ± {found['std']:.3f}" if len(found["runs"]) > 1 else "")


def plot(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw the first figure over the measured latency, one line per method, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    budgets = report["budgets"] if "budgets" in report else report["shares"]  # as releases before 0.1 wrote them
    name = next(iter(last_stage(report["dense"])))
    dense = report["dense"]["latency_ms"], last_stage(report["dense"])[name]["mean"]
    axes.plot(*dense, "k*", markersize=10)
    axes.annotate("dense", dense, (-8, -14), textcoords="offset points", ha="right")
    for method in dict.fromkeys(method for found in budgets.values() for method in found):
        colour, marker = LOOKS.get(method, (None, "o"))
        points = sorted((found[method] for found in budgets.values() if method in found), key=lambda p: p["latency_ms"])
        values = [last_stage(point)[name] for point in points]
        axes.errorbar(
            [point["latency_ms"] for point in points],
            [value["mean"] for value in values],
            [value["std"] for value in values],
            color=colour,
            marker=marker,
            label=METHODS[method].title if method in METHODS else method,
            capsize=3,
            linewidth=1.6,
        )
    device = report.get("device", {})
    axes.set_xlabel(f"measured latency per frame (ms){', ' + str(device['name']) if device.get('name') else ''}")
    tuned = report.get("finetune")
    axes.set_ylabel(f"{name} after {tuned['iterations']} iterations" if tuned else name)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
