"""The steps of a pruning job as functions over the nouns: used by the job, by hooks and by benchmarks alike.

Each reuses what an earlier run left in the work directory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from mdp_mmdet3d.adapters import Adapter
from mdp_mmdet3d.errors import FileFormatError, MdpError, StructureMismatchError
from mdp_mmdet3d.importance.collect import collect_importance
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.latency.predict import MeasuredNetwork
from mdp_mmdet3d.report.summary import decimals
from mdp_mmdet3d.runner.networks import load_networks, measure_networks
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.runtime.graph_manifest import load_manifest
from mdp_mmdet3d.runtime.manifest import MANIFEST_FILE
from mdp_mmdet3d.runtime.measure import LOADS, LatencyStats, measure_interleaved, session_device
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.plan import PruningPlan

TABLE_FILE = "latency_table.json"
MEASURED_FRAMES = 4  # distinct frames that an end-to-end measurement cycles through
Say = Callable[[str], None]


def find_space(adapter: Adapter, dense: nn.Module, settings: PruneSettings, path: Path, say: Say) -> PruningSpace:
    """Trace what may be pruned and keep it in ``path``.

    Raises:
        StructureMismatchError: ``path`` is of another model.
        MdpError: Nothing may be pruned.
    """
    space = adapter.trace(dense, settings.space_options)
    if not space.blocks and not any(len(dimension.options) > 1 for dimension in space.dimensions):
        raise MdpError(
            f"nothing of {space.model} is left to prune: prune.freeze = {list(settings.freeze)}, prune.min_keep = "
            f"{settings.min_keep:g} and prune.max_options = {settings.max_options} leave no dimension a choice"
        )
    if path.exists() and PruningSpace.load(path).model_digest != space.model_digest:
        raise StructureMismatchError(f"{path.parent} holds a run of another model; give another --work-dir")
    space.save(path)
    say(
        f"{len(space.dimensions)} dimensions, {len(space.blocks)} removable blocks, "
        f"{len(space.terms)} cost terms; {len(space.not_prunable)} parts left alone ({path.name})"
    )
    return space


def find_importance(
    adapter: Adapter, dense: nn.Module, space: PruningSpace, weights: str, frames: int, path: Path, say: Say
) -> ImportanceTable:
    """Importance over ``frames`` batches, or the table that ``path`` holds if it is of these weights and data."""
    data = adapter.data_identity()
    if path.exists():
        table = ImportanceTable.load(path, space)
        if (table.weights, table.data, table.frames) == (weights, data, frames):
            say(f"reused: {table.batches} frames")
            return table
        say("collected again: other weights, data or number of frames")
    found = collect_importance(
        dense,
        space,
        adapter.importance_batches(),
        path,
        losses=adapter.losses,
        num_batches=frames,
        weights=weights,
        data=data,
    )
    say(f"{found.batches} frames ({path.name})")
    return found


def export_model(
    adapter: Adapter, model: nn.Module, folder: Path, plan: PruningPlan | None, weights: str, say: Say
) -> None:
    """Export into ``folder``; a dense model with the same weights that is there already is kept."""
    if plan is None and (folder / MANIFEST_FILE).exists():
        try:
            manifest = load_manifest(folder)
            if manifest.weights == weights and adapter.is_deployed_so(manifest):
                say(f"reused: {folder}")
                return
        except FileFormatError as error:
            say(f"exported again: {error}")
    engines: list[str] = []
    adapter.export(model, folder, plan_hash=plan.hash if plan else None, weights=weights, on_engine=engines.append)
    say(f"exported {folder.name}: {', '.join(name.replace('_', ' ') for name in engines)}")


def measure_models(
    folders: Mapping[str, Path], frames: Sequence[Any], rounds: int, bar: Progress
) -> dict[str, LatencyStats]:
    """End-to-end latency of deployments, side by side."""
    torch.set_flush_denormal(True)  # OrtEngine asks for it too, but the export's onnxslim had the first session
    with bar:
        task = bar.add_task("end to end", total=None)
        return measure_interleaved(
            folders,
            frames[:MEASURED_FRAMES],
            rounds=rounds,
            on_round=lambda done, total: bar.update(task, completed=done, total=total),
        )


def find_networks(
    adapter: Adapter,
    dense: nn.Module,
    space: PruningSpace,
    settings: PruneSettings,
    work_dir: Path,
    weights: str,
    measure: Callable[[Mapping[str, Path]], dict[str, LatencyStats]],
    say: Say,
) -> list[MeasuredNetwork]:
    """Whole networks measured in one session, the dense one first: the reference that table and budget are tied to."""
    path = work_dir / "whole_latency.json"
    identity = {
        "device": str(session_device()),
        "fingerprint": space.model_digest,
        "input_size": list(settings.input_size),
        "count": settings.fit_networks,
        "loads": LOADS,
        **({"encoder_batch": settings.encoder_batch} if settings.encoder_batch else {}),
    }
    networks = load_networks(path, identity)
    if networks is None:
        folder = work_dir / "onnx"
        networks = measure_networks(
            path,
            identity,
            space,
            dense,
            folder,
            lambda model, name, plan: export_model(adapter, model, folder / name, plan, weights, say),
            lambda names: measure({name: folder / name for name in names}),
            count=settings.fit_networks,
        )
    else:
        say(f"reused: {path.name}")
    dense_ms = sum(networks[0].engines_ms.values())
    latency = f"{dense_ms:.{decimals(dense_ms)}f} ms = {1e3 / dense_ms:.2f} FPS"
    say(f"dense: {latency}; {len(networks)} networks measured for the fit")
    return networks


def frame_engine_files(folder: Path, once: Sequence[str]) -> list[Path]:
    """ONNX files of the engines that run every frame, each as often as it does."""
    manifest = load_manifest(folder)
    return [
        folder / spec.file
        for name, spec in manifest.engines.items()
        if name not in once
        for _ in range(manifest.runs(name))
    ]
