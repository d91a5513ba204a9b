"""Picture of a Pareto front; the only part of the solver that needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from mdp_mmdet3d.extras import needs
from mdp_mmdet3d.files import atomic_path
from mdp_mmdet3d.solver.pareto import ParetoFront


def plot_front(front: ParetoFront, path: str | Path) -> None:
    """Draw value kept over cost and write it as PNG; plans without proof are red.

    Args:
        front: What `pareto` returned.
        path: File to write, atomically.
    """
    with needs("all", "the picture of a Pareto front"):
        from matplotlib.figure import Figure

    rows = front.rows()
    costs, shares = [row["cost"] for row in rows], [100.0 * row["value_share"] for row in rows]
    colours = ["#1f5fa8" if row["status"] == "optimal" else "#c03028" for row in rows]
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(costs, shares, color="#1f5fa8", linewidth=0.8, alpha=0.6)
    axes.scatter(costs, shares, c=colours, s=14, zorder=3)
    axes.axvline(front.dense_cost, color="grey", linestyle=":", linewidth=1.0)
    axes.annotate(
        "dense", (front.dense_cost, 2.0), textcoords="offset points", xytext=(-4, 0), ha="right", color="grey"
    )
    axes.set_xlabel(front.metric)
    axes.set_ylabel("importance kept, % of dense")
    axes.set_title(f"{front.problem}: {len(rows)} plans of the exact Pareto front")
    axes.set_xlim(left=0.0)
    axes.set_ylim(0.0, 102.0)
    axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
