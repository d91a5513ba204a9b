"""Measuring a pruning space into a latency table, resumable at any moment."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mdp_mmdet3d.latency.backends.base import Backend
from mdp_mmdet3d.latency.sampling import Point, exact_points, grid_points
from mdp_mmdet3d.latency.table import LatencyTable
from mdp_mmdet3d.space import PruningSpace

Policy = Literal["grid", "exact", "none"]

_SAVE_EVERY_S = 2.0


def measure_latency(
    space: PruningSpace,
    backend: Backend,
    path: str | Path,
    *,
    policy: Policy = "grid",
    extra: Sequence[Point] = (),
    progress: bool = True,
) -> LatencyTable:
    """Measure what ``path`` does not hold yet and return the whole table.

    The file is replaced atomically every two seconds, so a kill loses no more than that.

    Args:
        space: What may be pruned; terms that do not run every frame are skipped.
        backend: What measures.
        path: Table file; it is created, or continued.
        policy: ``"grid"``: a few widths per role, the rest is interpolated; ``"exact"``: every combination of
            options; ``"none"``: only ``extra``.
        extra: Further points, e.g. `sampling.entries_of` a plan.
        progress: Show a progress bar with the remaining time.

    Raises:
        FileFormatError: ``path`` holds something that is no intact latency table.
        StructureMismatchError: ``path`` was measured on another device or by another protocol.
    """
    if policy not in ("grid", "exact", "none"):
        raise ValueError(f"policy {policy!r} is unknown; use 'grid', 'exact' or 'none'")
    path = Path(path)
    device = backend.fingerprint()
    if path.exists():
        table = LatencyTable.load(path)
        table.require(device, backend.protocol, what=f"latency table {path}")
    else:
        table = LatencyTable(device, backend.protocol)
    points: list[Point] = []
    if policy == "grid":
        points = grid_points(space)
    elif policy == "exact":
        points = exact_points(space)
    missing = [point for point in dict.fromkeys([*points, *extra]) if table.get(*point) is None]
    # Shuffled, so that a slow minute of the machine does not fall on one operator alone.
    random.Random(0).shuffle(missing)
    saved = time.monotonic()
    columns = (
        TextColumn("latency on {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, disable=not progress or not missing) as bar:
            task = bar.add_task(device.runtime, total=len(missing))
            for (signature, widths), entry in backend.measure(missing):
                table.add(signature, widths, entry)
                bar.advance(task)
                if time.monotonic() - saved > _SAVE_EVERY_S:
                    table.save(path)
                    saved = time.monotonic()
    finally:
        if missing:
            table.save(path)
    return table
