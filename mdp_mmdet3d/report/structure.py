"""A picture of a plan: how much of every dimension stays, and which blocks are gone."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from mdp_mmdet3d.files import atomic_path
from mdp_mmdet3d.space.types import Dimension, PruningSpace
from mdp_mmdet3d.surgery.plan import PruningPlan

COLOURS = {
    "channels": "#3b6fb6",
    "hidden": "#4a9b6e",
    "heads": "#c8743c",
    "qk_width": "#d9a25f",
    "v_width": "#e3c08f",
    "head_width": "#d9a25f",
    "embed_width": "#8f5fa8",
    "queries": "#7a7f8c",
}


def plot_structure(path: str | Path, space: PruningSpace, plan: PruningPlan) -> None:
    """Draw one bar per dimension (kept share) in two panels, image encoder and head; removed parts are hatched.

    Args:
        path: PNG to write.
        space: What could be pruned.
        plan: What stays.
    """
    encoder = sorted((d for d in space.dimensions if d.name.startswith("img_")), key=lambda d: _order(d.name))
    head = [d for d in space.dimensions if not d.name.startswith("img_")]
    figure, axes = plt.subplots(1, 2, figsize=(15, max(4.0, 0.19 * max(len(encoder), len(head)))))
    for axis, dimensions, title in ((axes[0], encoder, "image encoder"), (axes[1], head, "head")):
        for row, dimension in enumerate(dimensions):
            _bar(axis, row, dimension, space, plan)
        axis.set_yticks(range(len(dimensions)), [_label(d.name) for d in dimensions], fontsize=7)
        axis.set_ylim(max(len(dimensions), 1) - 0.5, -0.5)
        axis.set_xlim(0, 1.16)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        axis.set_xlabel("share kept")
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    legend = [Patch(color=c, label=k.replace("_", " ")) for k, c in COLOURS.items()]
    legend.append(Patch(facecolor="white", edgecolor="#b33", hatch="////", label="block removed"))
    figure.legend(handles=legend, loc="lower center", ncols=len(legend), frameon=False)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def _bar(axis: plt.Axes, row: int, dimension: Dimension, space: PruningSpace, plan: PruningPlan) -> None:
    # The stage width's consumers live in blocks too; a bar is gone only if every tensor of it is.
    gone = all(any(block.contains(m.tensor) for block in plan.removed.values()) for m in dimension.members)
    axis.barh(row, 1.0, color="#eeeeee", height=0.8)
    if gone:
        axis.barh(row, 1.0, facecolor="white", edgecolor="#b33", hatch="////", height=0.8, linewidth=0.4)
        axis.text(1.01, row, "removed", va="center", fontsize=6, color="#b33")
        return
    count = plan.width(dimension.name, dimension.size)
    axis.barh(row, count / dimension.size, color=COLOURS[dimension.kind.value], height=0.8)
    axis.text(1.01, row, f"{count}/{dimension.size}", va="center", fontsize=6)


def _label(name: str) -> str:
    short = name.replace("pts_bbox_head.", "").replace("img_backbone.", "").replace("transformer.decoder.", "")
    short = short.replace(".downsample.0.out", " (stage width)").replace(".attentions.0.attn", " self-attention")
    short = short.replace(".attentions.1.attn", " cross-attention").replace(".ffns.0.layers.0.0.out", " FFN hidden")
    return short.removesuffix(".out")


def _order(name: str) -> tuple[bool, bool, str]:
    """Backbone before neck, stem first."""
    return (name.startswith("img_neck"), not name.startswith("img_backbone.conv1"), name)
