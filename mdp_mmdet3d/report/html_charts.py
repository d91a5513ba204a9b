"""Charts as inline SVG: drawn by matplotlib, coloured by the page's style sheet, a tooltip on every point."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# matplotlib wants colours, the page has variables (light, dark, print): each stands in for one.
COLOURS = {
    "#100001": "var(--ink)",
    "#100002": "var(--quiet)",
    "#100003": "var(--line)",
    "#100004": "var(--kept)",
    "#100005": "var(--dense)",
    "#100006": "var(--alert)",
}
INK, QUIET, LINE, KEPT, DENSE, ALERT = COLOURS
SIZE = (5.4, 3.5)  # inches at 72 pixels: as wide as a phone's page
STYLE: Any = {  # keys are a Literal of all of matplotlib
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "mdp",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Mark:
    """A point of a scatter chart."""

    x: float
    y: float
    tooltip: str
    colour: str = KEPT
    marker: str = "o"
    label: str = ""
    size: float = 6.0


def scatter(
    name: str,
    marks: Sequence[Mark],
    x_label: str,
    y_label: str,
    *,
    joined: bool = False,
    diagonal: bool = False,
    limit_x: tuple[float, str] | None = None,
    title: str = "",
) -> str:
    """Draw points.

    Args:
        name: Unique on the page.
        marks: The points; those with a label are named beside the point.
        x_label: Of the horizontal axis.
        y_label: Of the vertical axis.
        joined: Join the points by a thin line.
        diagonal: Draw the line y = x, from 0.
        limit_x: A vertical line and its text.
        title: What the chart shows, for those who cannot see it.

    Returns:
        An ``<svg>`` element.
    """

    def draw(axes: Axes) -> None:
        xs, ys = [mark.x for mark in marks], [mark.y for mark in marks]
        if diagonal:
            top = 1.08 * max(*xs, *ys)
            axes.plot([0, top], [0, top], color=QUIET, linewidth=1, linestyle="--")
            axes.set_xlim(0, top)
            axes.set_ylim(0, top)
        if joined:
            axes.plot(xs, ys, color=KEPT, linewidth=1, alpha=0.5)
        if limit_x is not None:
            axes.axvline(limit_x[0], color=ALERT, linewidth=1, linestyle=":")
            axes.annotate(
                limit_x[1],
                (limit_x[0], 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(-4, 0),
                textcoords="offset points",
                ha="right",
                color=ALERT,
            )
        for index, mark in enumerate(marks):
            (point,) = axes.plot(mark.x, mark.y, mark.marker, color=mark.colour, markersize=mark.size)
            point.set_gid(f"mark-{index}")
            if mark.label:
                # Away from the line: a point above the diagonal has its name to the left, above it.
                right = mark.y > mark.x if diagonal else mark.x > (min(xs) + max(xs)) / 2
                axes.annotate(
                    mark.label,
                    (mark.x, mark.y),
                    xytext=(-7 if right else 7, 6 if right else -12),
                    textcoords="offset points",
                    ha="right" if right else "left",
                    color=mark.colour,
                )
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.7)

    return _svg(name, draw, title, {f"mark-{i}": mark.tooltip for i, mark in enumerate(marks)})


def _svg(name: str, draw: Callable[[Axes], None], title: str, tooltips: dict[str, str]) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.add_subplot())
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(content.getvalue())
    for element in list(root):
        if _local(element.tag) == "metadata":
            root.remove(element)
    for element in root.iter():
        element.tag = _local(element.tag)
        for key in list(element.attrib):
            value = element.attrib.pop(key)
            # Ids are unique per page, and references follow them.
            value = re.sub(r"url\(#", f"url(#{name}-", value)
            value = re.sub(r"^#", f"#{name}-", value) if _local(key) == "href" else value
            value = re.sub(r"font: ([^;']*?)px '[^;]*", r"font-size: \1px", value)
            if key == "id":
                tooltip = tooltips.get(value)
                value = f"{name}-{value}"
                if tooltip:
                    ElementTree.SubElement(element, "title").text = tooltip
            element.set(_local(key), value)
    width, height = root.get("viewBox", "0 0 1 1").split()[2:]
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", title)
    root.set("class", "chart")
    root.set("style", f"aspect-ratio: {float(width):.0f} / {float(height):.0f}")
    text = ElementTree.tostring(root, encoding="unicode")
    for stand_in, variable in COLOURS.items():
        text = text.replace(stand_in, variable)
    return text


def _local(name: str) -> str:
    return name.rpartition("}")[2]
