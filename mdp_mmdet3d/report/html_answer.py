"""The first screen of ``report.html``: was the budget met, what did it cost, what saved the time, what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdp_mmdet3d.report.html_inputs import RunFiles
from mdp_mmdet3d.report.html_latency import ModuleLatency
from mdp_mmdet3d.report.provenance import DEFAULT_TOLERANCE

BUSY = 2.0  # 90th percentile over median beyond which the machine did other things
APART = 0.1  # relative difference between the speed-up of turns and that of the two latencies beyond which it did too
NAMED = 4  # modules that are named as where the time was saved


@dataclass(frozen=True)
class Verdict:
    """Whether a run met its budget.

    Attributes:
        met: Within the run's own tolerance.
        distance: Latency relative to the budget, minus 1.
        tolerance: Largest distance that the run was content with.
    """

    met: bool
    distance: float
    tolerance: float


@dataclass(frozen=True)
class Step:
    """What to do next: why, and the command, if it is one."""

    text: str
    command: str = ""


def verdict(files: RunFiles) -> Verdict:
    """The latency, measured where it was, against the budget and the run's ``prune.tolerance``."""
    report = files.report
    distance = report["pruned"]["latency_ms" if files.measured else "predicted_ms"] / report["budget_ms"] - 1
    settings = (report.get("provenance") or {}).get("settings") or {}
    tolerance = settings.get("tolerance", DEFAULT_TOLERANCE)
    return Verdict(distance <= tolerance, distance, tolerance)


def savers(rows: Sequence[ModuleLatency], removed: Collection[str]) -> list[tuple[ModuleLatency, int]]:
    """Modules that saved most, at most `NAMED`, and how many whole blocks each lost.

    Args:
        rows: Every module.
        removed: Names of removed blocks; of nested ones the outermost counts.
    """
    outermost = [name for name in removed if not any(name.startswith(f"{other}.") for other in removed)]
    found = sorted((row for row in rows if row.saved_ms > 0), key=lambda row: -row.saved_ms)[:NAMED]
    return [(row, sum(f"{name}.".startswith(f"{row.name}.") for name in outermost)) for row in found]


def busy(files: RunFiles) -> str:
    """What says that the machine did other things while it measured; empty where nothing does."""
    dense, pruned, speedup = files.report["dense"], files.report["pruned"], files.report.get("speedup")
    median_ms, p90_ms = pruned.get("median_ms"), pruned.get("p90_ms")
    if median_ms and p90_ms and p90_ms / median_ms >= BUSY:
        times = f"{p90_ms / median_ms:.2g}"
        return f"The slowest tenth of the pruned model's frames took {times} times the median or more."
    if files.measured and speedup:
        factor = dense["latency_ms"] / pruned["latency_ms"]
        if abs(factor / speedup - 1) > APART:
            return (
                f"Taking turns the pruned model is {speedup:.2f} times faster; the two latencies here say {factor:.2f}."
            )
    return ""


def tool(files: RunFiles, name: str) -> str:
    """A tool as the run's own command calls them: from a checkout, or by the name that the package installs."""
    words = shlex.split((files.report.get("provenance") or {}).get("command") or "")
    if any(Path(word).name == "mdp-prune" for word in words[:2]):
        return f"mdp-{name.replace('_', '-')}"
    return f"python tools/{name}.py"


def next_steps(files: RunFiles) -> list[Step]:
    """What a user does with this result, the most pressing first."""
    report, folder = files.report, shlex.quote(str(files.work_dir))
    accuracy = report.get("accuracy") or {}
    steps = []
    if report.get("weights") == "random":
        return [
            Step("Run it again with trained weights (--checkpoint): of random ones no part is worth more than another.")
        ]
    if not files.measured:
        steps.append(
            Step("Measure it on the target.", f"{tool(files, 'validate_fps')} DEPLOYMENT --report {folder}/report.json")
        )
    elif not verdict(files).met:
        allowed = ((report.get("provenance") or {}).get("settings") or {}).get("refinements", 0)
        more = f"with --cfg-options prune.refinements={2 * allowed}" if allowed else "with prune.refinements"
        again = "on a quiet machine" if busy(files) else more
        steps.append(Step(f"The budget was missed: run the same command again {again}, or ask for less."))
    if not accuracy:
        steps.append(
            Step(
                "Find out what it costs in accuracy.",
                f"{tool(files, 'test')} {folder}/pruned_config.py {folder}/pruned.pth",
            )
        )
    if "finetuned" not in accuracy:
        steps.append(
            Step("Fine-tune it: repair refits, it does not train.", f"{tool(files, 'train')} {folder}/pruned_config.py")
        )
        weights = ""
    else:
        longer = "A longer fine-tuning may bring more back."
        steps.append(Step(longer, f"{tool(files, 'train')} {folder}/pruned_config.py"))
        weights = f" --checkpoint {folder}/finetune/finetuned.pth"
    steps.append(Step("Export it for deployment.", f"{tool(files, 'export')} {folder}{weights}"))
    return steps
