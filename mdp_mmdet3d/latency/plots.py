"""Pictures of a latency table: staircases per operator, and where the milliseconds of a model are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from mdp_mmdet3d.files import atomic_path
from mdp_mmdet3d.latency.sampling import width_options
from mdp_mmdet3d.latency.table import LatencyTable
from mdp_mmdet3d.operators import OPERATORS, OperatorSignature
from mdp_mmdet3d.space import CostTerm, PruningSpace

_COLUMNS = 4
_LINES = 4


def plot_staircases(space: PruningSpace, table: LatencyTable, path: str | Path) -> None:
    """One panel per operator signature: latency over its last width that varies, a line per value of the others.

    Filled markers are measured, hollow ones interpolated.

    Args:
        space: Whose terms are shown, each signature once.
        table: Covers them.
        path: PNG file to write.
    """
    terms: dict[OperatorSignature, CostTerm] = {}
    for term in space.frame_terms():
        if term.dimensions:
            terms.setdefault(term.signature, term)
    rows = math.ceil(len(terms) / _COLUMNS)
    figure, axes = plt.subplots(rows, _COLUMNS, figsize=(4.2 * _COLUMNS, 3.0 * rows), squeeze=False)
    for axis in axes.flat[len(terms) :]:
        axis.set_visible(False)
    for axis, term in zip(axes.flat, terms.values(), strict=False):
        _panel(axis, space, table, term)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
    plt.close(figure)


def _panel(axis: Axes, space: PruningSpace, table: LatencyTable, term: CostTerm) -> None:
    roles = OPERATORS[term.signature.kind].roles
    options = [width_options(space, width) for width in term.widths]
    along = max(rank for rank, counts in enumerate(options) if len(counts) > 1)
    for counts in _few([(0,) if rank == along else axis for rank, axis in enumerate(options)]):
        rows = np.array([[*counts[:along], width, *counts[along + 1 :]] for width in options[along]])
        ms, interpolated = table.lookup_many(term.signature, rows)
        label = ", ".join(
            f"{role} {count}" for rank, (role, count) in enumerate(zip(roles, counts, strict=True)) if rank != along
        )
        (line,) = axis.plot(options[along], ms, linewidth=1, label=label or None)
        for mask, fill in ((~interpolated, line.get_color()), (interpolated, "white")):
            axis.plot(
                np.array(options[along])[mask],
                ms[mask],
                "o",
                markersize=4,
                color=line.get_color(),
                markerfacecolor=fill,
            )
    axis.set_title(term.name.rsplit("decoder.", 1)[-1], fontsize=8)
    axis.set_xlabel(roles[along], fontsize=7)
    axis.set_ylabel("ms", fontsize=7)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=7)
    if len(roles) > 1:
        axis.legend(fontsize=6)


def _few(axes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """A few combinations of the other widths, from all smallest to all dense."""
    steps = np.linspace(0, 1, _LINES if any(len(axis) > 1 for axis in axes) else 1)
    return list(dict.fromkeys(tuple(axis[round(step * (len(axis) - 1))] for axis in axes) for step in steps))


def plot_breakdown(breakdowns: Mapping[str, Mapping[str, float]], path: str | Path) -> None:
    """Stacked bars of `LatencyModel.breakdown` results, one bar per model.

    Args:
        breakdowns: Milliseconds per module, for each model, e.g. ``{"dense": {...}, "pruned": {...}}``.
        path: PNG file to write.
    """
    modules = list(dict.fromkeys(module for rows in breakdowns.values() for module in rows))
    modules.sort(key=lambda module: -max(rows.get(module, 0.0) for rows in breakdowns.values()))
    figure, axis = plt.subplots(figsize=(10, 2.4 + 0.7 * len(breakdowns)), layout="constrained")
    left = np.zeros(len(breakdowns))
    colours = plt.get_cmap("tab20")
    for index, module in enumerate(modules):
        values = np.array([rows.get(module, 0.0) for rows in breakdowns.values()])
        axis.barh(list(breakdowns), values, left=left, label=module, color=colours(index % 20))
        left += values
    axis.invert_yaxis()
    axis.set_xlabel("ms per frame, predicted")
    figure.legend(fontsize=7, ncols=4, loc="outside lower center")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
