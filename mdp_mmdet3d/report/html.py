"""``report.html``: one self-contained page about a run, from what the run left in its work directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from mdp_mmdet3d import __version__
from mdp_mmdet3d.device import Device
from mdp_mmdet3d.files import atomic_path
from mdp_mmdet3d.report.html_answer import busy, next_steps, savers, tool, verdict
from mdp_mmdet3d.report.html_charts import ALERT, DENSE, INK, KEPT, QUIET, Mark, scatter
from mdp_mmdet3d.report.html_front import TIME_LIMIT_S, Front, FrontPoint, front
from mdp_mmdet3d.report.html_inputs import RunFiles
from mdp_mmdet3d.report.html_latency import Compared, breakdown, compared
from mdp_mmdet3d.report.html_structure import structure

HTML_FILE = "report.html"
ACCURACY_NAMES = {
    "dense": "dense",
    "pruned": "pruned, after the cut",
    "repaired": "pruned, repaired",
    "finetuned": "pruned, fine-tuned",
}


def write_html(work_dir: str | Path, *, front_limit_s: float = TIME_LIMIT_S) -> Path:
    """Write ``report.html`` of a finished run beside its ``report.json``, atomically.

    Args:
        work_dir: Work directory of ``tools/prune.py``.
        front_limit_s: Seconds that solving for other budgets may take; 0 leaves them out.

    Returns:
        Path of the page.

    Raises:
        MdpError: The run has not finished, or the folder is none of ours; nothing is written then.
    """
    files = RunFiles.load(work_dir)
    text = render(files, front(files, front_limit_s) if front_limit_s > 0 else "left out by request")
    path = files.work_dir / HTML_FILE
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def render(files: RunFiles, found: Front | str) -> str:
    """The page as text.

    Args:
        files: The run.
        found: Plans for other budgets, or why there are none.
    """
    environment = Environment(
        loader=PackageLoader("mdp_mmdet3d.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        num=number,
        ms=milliseconds,
        fps=frames_per_second,
        percent=percent,
        change=change,
        above=above,
        signed=signed,
        gained=gained,
        breakable=breakable,
    )
    report = files.report
    rows = compared(files)
    modules = breakdown(files)
    return environment.get_template("report.html.j2").render(
        report=report,
        files=files,
        version=__version__,
        device=_device(report["device"]),
        measured=files.measured,
        figures=_figures(report, files.measured),
        scale_ms=_dense_ms(report, files.measured),
        engines=structure(files),
        breakdown=modules,
        verdict=verdict(files),
        savers=savers(modules, files.removed),
        busy=busy(files),
        next_steps=next_steps(files),
        tool=partial(tool, files),
        front=found,
        front_chart=None if isinstance(found, str) else Markup(_front_chart(found)),
        front_rows=[] if isinstance(found, str) else _front_rows(found),
        share=_share,
        compared=rows,
        compared_chart=Markup(_compared_chart(rows)) if len(rows) > 1 else None,
        accuracy=_accuracy(report),
        metrics=list(dict.fromkeys(m for figures in (report.get("accuracy") or {}).values() for m in figures)),
        provenance=report.get("provenance") or {},
    )


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant figures, without an exponent; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    if "e" in text:
        text = f"{value:.0f}" if abs(value) >= 1 else f"{value:.{digits - 1}e}"
    return text


def milliseconds(value: float | None) -> str:
    """As many decimals as a latency of that size deserves."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3}f}"


def frames_per_second(value: float) -> str:
    """As many decimals as a frame rate of that size deserves."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent."""
    return "–" if value is None else f"{100 * value:.{digits}f}\u00a0%"


def change(value: float, digits: int = 1) -> str:
    """A relative difference in per cent with its sign."""
    text = f"{100 * value:+.{digits}f}"
    if float(text) == 0:
        text = text[1:]
    return f"{text}\u00a0%".replace("-", "−")


def signed(value: float, error: float | None = None) -> str:
    """A difference with its sign and, where there is one, its standard error."""
    text = f"{value:+.3f}" + ("" if error is None else f" ± {error:.3f}")
    return text.replace("-", "−")


def gained(value: float, dense: float) -> str:
    """What an accuracy gained over the dense model's, to as many decimals as the accuracy is shown with."""
    decimals = len(number(value).partition(".")[2])
    return f"{value - dense:+.{decimals}f}".replace("-", "−")


def breakable(name: str) -> Markup:
    """A module's name that may go on in the next line after a dot or underscore."""
    text = str(escape(name))
    return Markup(text.replace("_", "_<wbr>").replace(".", ".<wbr>"))


def above(value: float, digits: int = 1) -> str:
    """A relative difference in words: so many per cent above or below."""
    return f"{percent(abs(value), digits)} {'above' if value >= 0 else 'below'}"


def _dense_ms(report: Mapping[str, Any], measured: bool) -> float:
    return report["dense"]["latency_ms" if measured else "predicted_ms"]


def _figures(report: Mapping[str, Any], measured: bool) -> list[dict[str, Any]]:
    """Rows of the table dense against pruned; what was not measured is left out."""
    rows = []
    for title, key, scale in (
        ("latency per frame, measured (ms)", "latency_ms", 1.0),
        ("median (ms)", "median_ms", 1.0),
        ("90th percentile (ms)", "p90_ms", 1.0),
        ("latency per frame, predicted (ms)", "predicted_ms", 1.0),
        ("frames per second" if measured else "frames per second, predicted", "fps", 1.0),
        ("parameters (M)", "params", 1e-6),
        ("multiply-accumulates per frame (G)", "macs", 1e-9),
    ):
        dense, pruned = report["dense"].get(key), report["pruned"].get(key)
        if dense is not None and pruned is not None:
            rows.append({"title": title, "key": key, "scale": scale, "dense": dense, "pruned": pruned})
    engines = [report[name].get("engines_ms") or {} for name in ("dense", "pruned")]
    for engine in engines[0] if len(engines[0]) > 1 else ():
        if engine in engines[1]:
            rows.append(
                {
                    "title": f"{engine.replace('_', ' ')} (ms)",
                    "key": engine,
                    "scale": 1.0,
                    "dense": engines[0][engine],
                    "pruned": engines[1][engine],
                }
            )
    return rows


def _accuracy(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, figures in (report.get("accuracy") or {}).items():
        latency_ms = report["dense" if name == "dense" else "pruned"].get("latency_ms")
        rows.append({"name": ACCURACY_NAMES.get(name, name), "figures": figures, "latency_ms": latency_ms})
    return rows


def _share(point: FrontPoint, found: Front) -> float:
    """Importance that a plan keeps, relative to the dense model's."""
    return point.value / found.dense.value if found.dense.value else 1.0


def _front_rows(found: Front) -> list[tuple[str, FrontPoint]]:
    """Names and plans for the table: budgets with the same best plan share a row."""
    groups: dict[tuple[float, float], list[FrontPoint]] = {}
    for point in found.points:
        groups.setdefault((round(point.latency_ms, 6), round(point.value, 9)), []).append(point)
    rows = []
    for points in groups.values():
        near = sorted(point.of_budget for point in points if point.of_budget not in (None, 1.0))
        names = [change(of_budget - 1, 0) for of_budget in near]
        if not names:
            names = [f"{milliseconds(max(point.budget_ms for point in points))} ms"]
        for special, name in ((found.chosen, "chosen"), (found.dense, "dense")):
            if special in points:
                rows.append((", ".join([name, *(names if near else [])]), special))
                break
        else:
            rows.append((f"budget {', '.join(names)}", points[0]))
    return rows


def _front_chart(found: Front) -> str:
    marks = []
    for point in found.points:
        share = _share(point, found)
        text = f"{milliseconds(point.latency_ms)} ms, {percent(share)} of the importance"
        text += f", {point.removed_blocks} blocks removed"
        if point is found.chosen:
            mark = Mark(point.latency_ms, 100 * share, f"chosen: {text}", INK, "D", "chosen", 8.0)
        elif point is found.dense:
            mark = Mark(point.latency_ms, 100 * share, f"dense: {text}", DENSE, "s", "dense")
        else:
            more = "" if point.of_budget is None else f"{change(point.of_budget - 1, 0)} of the budget: "
            proof = "" if point.proven else "; not proven to be the best"
            mark = Mark(point.latency_ms, 100 * share, f"{more}{text}{proof}", KEPT if point.proven else ALERT)
        marks.append(mark)
    return scatter(
        "front",
        marks,
        "predicted latency per frame (ms)",
        "importance kept (% of dense)",
        joined=True,
        limit_x=(found.chosen.budget_ms, "budget"),
        title="Importance kept over latency for the best plan of several budgets",
    )


def _compared_chart(rows: list[Compared]) -> str:
    marks = []
    for row in rows:
        text = f"{row.name}: predicted {milliseconds(row.predicted_ms)} ms, "
        text += f"measured {milliseconds(row.measured_ms)} ms ({change(row.error)})"
        mark = Mark(row.measured_ms, row.predicted_ms, text, QUIET)
        if row.name == "dense":
            mark = replace(mark, colour=DENSE, marker="s", label="dense")
        elif row.role == "result":
            mark = replace(mark, colour=KEPT, marker="D", label=row.name, size=8.0)
        marks.append(mark)
    return scatter(
        "compared",
        marks,
        "measured (ms)",
        "predicted (ms)",
        diagonal=True,
        title="Predicted over measured latency of networks that were measured whole",
    )


def _device(device: Mapping[str, Any]) -> str:
    if "runtime" in device:
        return str(Device(**device))
    # As early reports of version 1 describe it.
    return ", ".join(f"{name} {value}".replace("_", " ") for name, value in device.items())
