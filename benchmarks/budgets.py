"""One network, several budgets: predicted against measured, before any correction, with the times of every step.

    python benchmarks/budgets.py configs/resnet/resnet50_mdp.py --json work_dirs/budgets/resnet50.json

The first budget makes space, importance, whole networks and the latency table; the others reuse them and measure what
their own plan lacks. ``refinements`` is 0: the plan that the first solve gives is measured as it is, so the deviation
says how good the latency model is. ``tools/prune.py`` would correct it and solve again where it is above 2 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdp_mmdet3d.files import read_json, write_json

SCHEMA_VERSION = 1
COLUMNS = (
    "budget", "status", "gap", "solve s", "predicted ms", "measured ms", "measured to predicted", "from budget",
    "blocks removed", "parameters M", "multiply-accumulates G", "ONNX = PyTorch", "seconds",
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--budgets", nargs="+", default=["0.8", "0.7", "0.6", "0.5", "0.4"])
    parser.add_argument("--work-dir", type=Path, help="default: work_dirs/budgets/CONFIG")
    parser.add_argument("--json", type=Path, required=True, help="results; budgets that it holds are not run again")
    return parser.parse_args()


def run(config_path: Path, budget: str, work_dir: Path) -> dict[str, Any]:
    """Prune to one budget; what the table needs."""
    import mdp_mmdet3d.runner  # noqa: F401  registers the pruned model
    from mdp_mmdet3d.config_file import read_config
    from mdp_mmdet3d.runner.job import PruneJob
    from mdp_mmdet3d.runner.settings import PruneSettings

    config = read_config(config_path, None)
    settings = dataclasses.replace(PruneSettings.from_config(config.prune), budget=budget, refinements=0)
    report = PruneJob(config, settings, work_dir, config.get("checkpoint"), Console(stderr=True)).run()
    solver, pruned, dense = report["solver"], report["pruned"], report["dense"]
    return {
        "status": solver["status"],
        "gap": solver["gap"],
        "solve_seconds": report["seconds"]["solve"],
        # In milliseconds of the session that the budget refers to: dense and pruned took turns in a later one.
        "predicted_ms": pruned["predicted_ms"],
        "measured_ms": pruned["latency_ms"] / report["session_drift"],
        "budget_ms": report["reference_budget_ms"],
        "dense_ms": dense["latency_ms"] / report["session_drift"],
        "dense_predicted_ms": dense["predicted_ms"],
        "removed": len(report["removed_blocks"]),
        "blocks": _count(work_dir),
        "params": pruned["params"],
        "macs": pruned["macs"],
        "difference": max(report["differences"]["pruned"].values()),
        "seconds": report["seconds"],
        "device": report["device"],
        "version": report["version"],
    }


def _count(work_dir: Path) -> int:
    from mdp_mmdet3d.space.types import PruningSpace

    return len(PruningSpace.load(work_dir / "space.json").blocks)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, a line per budget."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for budget, r in results.items():
        cells = [
            budget,
            r["status"],
            f"{r['gap']:.0e}",
            f"{r['solve_seconds']:.1f}",
            f"{r['predicted_ms']:.1f}",
            f"{r['measured_ms']:.1f}",
            f"{r['measured_ms'] / r['predicted_ms'] - 1:+.1%}",
            f"{r['measured_ms'] / r['budget_ms'] - 1:+.1%}",
            f"{r['removed']} of {r['blocks']}",
            f"{r['params'] / 1e6:.2f}",
            f"{r['macs'] / 1e9:.2f}",
            f"{r['difference']:.0e}",
            f"{r['seconds']['total']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    first = next(iter(results.values()))
    steps = ", ".join(f"{name} {seconds:.0f}" for name, seconds in first["seconds"].items() if name != "total")
    return "\n".join(lines) + f"\n\nDense {first['dense_ms']:.1f} ms. Seconds of the first run: {steps}.\n"


def main() -> int:
    args = parse_args()
    work_dir = args.work_dir or Path("work_dirs/budgets") / args.config.stem
    stored = read_json(args.json, what="results", schema_version=SCHEMA_VERSION) if args.json.exists() else {}
    results = stored.get("budgets", {})
    for budget in args.budgets:
        if budget not in results:
            results[budget] = run(args.config, budget, work_dir)
            write_json(args.json, {"schema_version": SCHEMA_VERSION, "config": str(args.config), "budgets": results})
    print(table({budget: results[budget] for budget in args.budgets}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
