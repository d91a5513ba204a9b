"""Draw what benchmarks/mini_nuscenes.py found: accuracy over measured latency, one line per method.

python benchmarks/plot_mini_nuscenes.py docs/results/mini_nuscenes.json docs/images/mini_nuscenes.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from mdp_mmdet3d.files import atomic_path

METHODS = {
    "mdp": ("MDP (this package)", "#1a66b8", "o"),
    "halp": ("HALP", "#c8743c", "s"),
    "uniform": ("uniform", "#777777", "^"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="JSON of benchmarks/mini_nuscenes.py")
    parser.add_argument("picture", type=Path, help="PNG to write")
    args = parser.parse_args()
    results = json.loads(args.results.read_text(encoding="utf-8"))
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    dense = results["dense"]
    axes.plot(dense["latency_ms"], dense["finetuned"]["mAP"]["mean"], "k*", markersize=10)
    axes.annotate(
        "dense",
        (dense["latency_ms"], dense["finetuned"]["mAP"]["mean"]),
        (-8, -14),
        textcoords="offset points",
        ha="right",
    )
    for method, (title, colour, marker) in METHODS.items():
        found = sorted((share[method] for share in results["shares"].values()), key=lambda plan: plan["latency_ms"])
        mean = [plan["finetuned"]["mAP"]["mean"] for plan in found]
        spread = [plan["finetuned"]["mAP"]["std"] for plan in found]
        latency = [plan["latency_ms"] for plan in found]
        axes.errorbar(latency, mean, spread, color=colour, marker=marker, label=title, capsize=3, linewidth=1.6)
    axes.set_xlabel("measured latency per frame (ms), ONNX Runtime, one thread")
    axes.set_ylabel("mAP after 300 iterations")
    axes.set_ylim(bottom=-0.02)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    with atomic_path(args.picture) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


if __name__ == "__main__":
    main()
