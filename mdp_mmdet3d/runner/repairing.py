"""Repair as a step of the pruning job: frames from the adapter, finished layers in the work directory, progress."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from rich.console import Console
from torch import nn

from mdp_mmdet3d.adapters import RANDOM, Adapter
from mdp_mmdet3d.files import file_sha256
from mdp_mmdet3d.progress import PlainProgress, step_bar
from mdp_mmdet3d.surgery.plan import PruningPlan
from mdp_mmdet3d.surgery.repair import RepairReport, RepairSettings, RepairStore, repair

FOLDER = "repair"


def repair_identity(adapter: Adapter, plan: PruningPlan, weights: str, settings: RepairSettings) -> dict[str, Any]:
    """What repaired weights depend on: plan, dense weights, the content of the info file, settings."""
    data = adapter.data_identity()
    content = file_sha256(data)[:16] if Path(data).is_file() else None
    facts = {"plan": plan.hash, "weights": weights, "data": data, "content": content}
    return {**facts, **settings.identity, "frames": _count(adapter, settings)}


def _count(adapter: Adapter, settings: RepairSettings) -> int:
    shape = adapter.shape
    return settings.count(shape.num_cams * shape.height * shape.width)


def repair_model(
    adapter: Adapter,
    dense: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    weights: str,
    settings: RepairSettings | None,
    work_dir: Path,
    console: Console,
    say: Callable[[str], None],
) -> RepairReport | None:
    """Refit ``pruned`` in place, or read what an earlier run found; None where it is switched off or makes no sense.

    Args:
        adapter: Gives the calibration frames.
        dense: The dense model with its weights.
        pruned: The pruned model, as it was cut.
        plan: What stays.
        weights: Identity of the dense weights.
        settings: How; None: not at all.
        work_dir: Finished layers are kept in its folder ``repair``.
        console: Shows the progress.
        say: Receives lines for people.

    Raises:
        MdpError: There are no frames, or a value is not finite.
    """
    if settings is None or weights == RANDOM:
        return None
    identity = repair_identity(adapter, plan, weights, settings)
    store = RepairStore(work_dir / FOLDER, identity, writes=is_main_process())
    report = store.apply(pruned)
    if report is not None:
        say(f"reused: {len(report.refitted)} layers")
        return report
    frames = adapter.calibration_frames(dense, _count(adapter, settings), settings.stride)
    with step_bar(console) as bar:
        task = bar.add_task("repair", total=None)
        plain: list[PlainProgress] = []

        def on_layer(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not plain:
                plain.append(PlainProgress(bar.console, "repair", total, "layers", done - 1))
            plain[0](done)

        report = repair(dense, pruned, plan, frames, settings, store=store, on_layer=on_layer)
    say(sentence(report))
    return report


def sentence(report: RepairReport) -> str:
    """What came of it, in one line."""
    facts = report.summary()
    errors = facts["median_held_out_error"]
    median = f"; median error on held-out frames {errors['before']:.3f}, now {errors['after']:.3f}" if errors else ""
    worse = sum(layer.left.startswith("no better") for layer in report.layers)
    return f"{facts['refitted']} layers refitted{median}; {worse} left alone since it did not help"
