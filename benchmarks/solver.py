"""The solver and what others do, on saved instances: value kept, proof, true latency, time.

    python benchmarks/solver.py --instances ../shared/data/solver_instances --json docs/results/solver.json \
        --markdown docs/results/solver.md --plot docs/results/solver.png
"""

from __future__ import annotations

import argparse
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from mdp_mmdet3d.errors import InfeasibleBudgetError
from mdp_mmdet3d.files import atomic_path, write_json
from mdp_mmdet3d.solver import PruningProblem, solve
from mdp_mmdet3d.solver.baselines import Baseline, ablated, direct, greedy, halp, uniform
from mdp_mmdet3d.solver.scaling import within

BUDGETS = (0.7, 0.5, 0.3, 0.15)
HALP_STEPS = 10
# Shown in this order in tables and plot; the values are line colours.
COLOURS = {
    "MDP, exact": "#1f5fa8",
    "channels, joint latency": "#7ea6d8",
    "channels + blocks, linear latency": "#a06bb4",
    "HALP": "#c9a227",
    "HALP, fitted": "#e07b39",
    f"HALP, {HALP_STEPS} steps": "#c03028",
    "greedy": "#3c8d50",
    "uniform": "#808080",
    "SCIP, bilinear": "#000000",
}


def exact(problem: PruningProblem, metric: str, budget: float) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        result = solve(problem, {metric: budget})
    except InfeasibleBudgetError as error:
        return {
            "method": "MDP, exact",
            "status": "infeasible",
            "seconds": time.perf_counter() - start,
            "minimum": error.minimum,
        }
    return {
        "method": "MDP, exact",
        "status": result.status.value,
        "value": result.objective,
        "bound": result.bound,
        "gap": result.gap,
        "cost": result.costs[metric],
        "feasible": within(budget, result.costs[metric]),
        "seconds": time.perf_counter() - start,
        "phases": result.seconds,
        "proof": result.proof,
        "states": [result.states_total, result.states_removed],
        "minimum": result.minimum[metric],
    }


def baseline_row(result: Baseline) -> dict[str, Any]:
    row: dict[str, Any] = {
        "method": result.method,
        "seconds": result.seconds,
        "feasible": result.feasible,
        "note": result.note,
        "status": "none" if result.plan is None else "found",
    }
    if result.plan is not None:
        row |= {"value": result.value, "cost": result.cost}
    return row


def methods(problem: PruningProblem, metric: str, budget: float, direct_limit_s: float) -> list[Callable[[], Any]]:
    found = [
        lambda: ablated(problem, metric, budget, blocks=False, linear=False),
        lambda: ablated(problem, metric, budget, blocks=True, linear=True),
        lambda: halp(problem, metric, budget),
        lambda: halp(problem, metric, budget, tighten=True),
        lambda: halp(problem, metric, budget, steps=HALP_STEPS),
        lambda: greedy(problem, metric, budget),
        lambda: uniform(problem, metric, budget),
    ]
    if direct_limit_s > 0:
        found.append(lambda: direct(problem, metric, budget, time_limit_s=direct_limit_s))
    return found


def measure(paths: Iterable[Path], baselines: bool, direct_limit_s: float) -> list[dict[str, Any]]:
    rows = []
    for path in paths:
        problem = PruningProblem.load(path)
        metric = problem.metrics[0]
        for share in BUDGETS:
            budget = share * problem.dense.costs[metric]
            found = [exact(problem, metric, budget)]
            if baselines:
                found += [baseline_row(run()) for run in methods(problem, metric, budget, direct_limit_s)]
            for row in found:
                common = {"instance": path.stem, "budget_share": share}
                if "value" in row:
                    common["value_share"] = row["value"] / problem.dense.value
                    common["cost_to_budget"] = row["cost"] / budget
                rows.append({**common, **row})
                print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    value = f"{row['value_share']:.6f}" if "value_share" in row else "-"
    cost = f"{row['cost_to_budget']:.4f}" if "value_share" in row else "-"
    broken = "" if row.get("feasible", True) or "value_share" not in row else "  BREAKS THE BUDGET"
    gap = f"{row['gap']:.1e}" if "gap" in row else ""
    return (
        f"{row['instance']:<20} {row['budget_share']:<5} {row['method']:<34} {value:>9} {cost:>7} {gap:>8} "
        f"{row['seconds']:8.2f} s  {row['status']}{broken}"
    )


def markdown(rows: list[dict[str, Any]], about: str) -> str:
    names = [name for name in COLOURS if any(row["method"] == name for row in rows)]
    text = [
        "# Solver: results",
        "",
        about,
        "",
        "Share of the dense importance kept; **bold**: proven optimum; "
        '(x): costs x times the budget by the true table; -: no plan. "HALP, fitted": its own budget '
        "is moved until the true latency just fits, which compares at equal true latency.",
        "",
        "| instance | budget | " + " | ".join(names) + " | exact, s |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    for instance, share in dict.fromkeys((row["instance"], row["budget_share"]) for row in rows):
        cells = {row["method"]: row for row in rows if (row["instance"], row["budget_share"]) == (instance, share)}
        shown = []
        for name in names:
            row = cells.get(name, {})
            entry = f"{row['value_share']:.4f}" if "value_share" in row else "-"
            if row.get("status") == "optimal":
                entry = f"**{entry}**"
            elif "value_share" in row and not row["feasible"]:
                entry += f" ({row['cost_to_budget']:.2f})"
            shown.append(entry)
        text.append(f"| {instance} | {share} | " + " | ".join(shown) + f" | {cells['MDP, exact']['seconds']:.2f} |")
    return "\n".join(text) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    shown = [
        name
        for name in ("off_r50_step29", "off_r101_step0", "r50_c16", "spetr_r50_c16")
        if any(row["instance"] == name for row in rows)
    ]
    figure = Figure(figsize=(3.3 * max(len(shown), 1), 4.0), layout="constrained")
    axes = figure.subplots(1, max(len(shown), 1), sharey=True, squeeze=False)[0]
    for axis, instance in zip(axes, shown):
        for method, colour in reversed(COLOURS.items()):
            points = [
                (row["cost_to_budget"] * row["budget_share"], row["value_share"])
                for row in rows
                if row["instance"] == instance and row["method"] == method and "value_share" in row
            ]
            if points:
                axis.plot(*zip(*sorted(points)), marker="o", markersize=3, linewidth=1.1, color=colour, label=method)
        axis.set_title(instance, fontsize=9)
        axis.set_xlabel("true latency, share of dense")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("importance kept, share of dense")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], fontsize=8, loc="outside lower center", ncols=4)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def main() -> None:
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "solver_instances"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=Path, default=default, help="folder of PruningProblem files")
    parser.add_argument("--only", nargs="+", help="names of instances to run")
    parser.add_argument("--json", type=Path, help="also write all rows here")
    parser.add_argument("--markdown", type=Path, help="also write a table here")
    parser.add_argument("--plot", type=Path, help="also write a picture here")
    parser.add_argument("--no-baselines", action="store_true", help="the exact route only")
    parser.add_argument(
        "--direct-limit",
        type=float,
        default=0.0,
        help="seconds for SCIP on the plain bilinear form; 0 (default) leaves it out",
    )
    args = parser.parse_args()
    paths = sorted(path for path in args.instances.glob("*.npz") if not args.only or path.stem in args.only)
    if not paths:
        parser.error(f"no instances in {args.instances}")
    rows = measure(paths, not args.no_baselines, args.direct_limit)
    own = [row for row in rows if row["method"] == "MDP, exact" and "value" in row]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    about = (
        f"{len(own)} solves: {sum(row['status'] == 'optimal' for row in own)} optimal, largest gap "
        f"{max(row['gap'] for row in own):.1e}, {sum(not row['feasible'] for row in own)} over budget, slowest "
        f"{max(row['seconds'] for row in own):.2f} s, peak memory of the whole benchmark {memory:.0f} MiB; "
        f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}."
    )
    print(about)
    if args.json:
        write_json(args.json, {"schema_version": 1, "about": about, "rows": rows})
    if args.markdown:
        with atomic_path(args.markdown) as temporary:
            temporary.write_text(markdown(rows, about + f"\n\n`{' '.join(['python', *sys.argv])}`"), encoding="utf-8")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
