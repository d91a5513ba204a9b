"""Measuring a pruning space into a latency table, resumable at any moment."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mdp_mmdet3d.latency.backends.base import Backend
from mdp_mmdet3d.latency.sampling import Point, Policy, policy_points
from mdp_mmdet3d.latency.table import LatencyTable
from mdp_mmdet3d.progress import PlainProgress
from mdp_mmdet3d.space import PruningSpace

MAX_ATTEMPTS = 3
SURPRISING = 1.2
_SAVE_EVERY_S = 2.0


def measure_latency(
    space: PruningSpace,
    backend: Backend,
    path: str | Path,
    *,
    policy: Policy = "grid",
    extra: Sequence[Point] = (),
    improve: bool = False,
    progress: bool = True,
) -> LatencyTable:
    """Measure what ``path`` does not hold yet and return the whole table.

    The file is replaced atomically every two seconds, so a kill loses no more than that. Points that were
    measured while the machine was busy with something else are measured again, `MAX_ATTEMPTS` times at most. A complete
    table is returned as it is.

    Args:
        space: What may be pruned; terms that do not run every frame are skipped.
        backend: What measures.
        path: Table file; it is created, or continued.
        policy: See `sampling.policy_points`; ``"none"``: only ``extra``.
        extra: Further points, e.g. `sampling.entries_of` a plan.
        improve: Measure disturbed entries of an earlier call again, even if nothing is missing.
        progress: Show a progress bar with the remaining time, or a line now and then where there is no terminal.

    Raises:
        FileFormatError: ``path`` holds something that is no intact latency table.
        StructureMismatchError: ``path`` was measured on another device or by another protocol.
    """
    wanted = list(dict.fromkeys([*policy_points(space, policy), *extra]))
    path = Path(path)
    device = backend.fingerprint()
    if path.exists():
        table = LatencyTable.load(path)
        table.require(device, backend.protocol, what=f"latency table {path}")
    else:
        table = LatencyTable(device, backend.protocol)
    if not improve and all(table.get(*point) is not None for point in wanted):
        return table
    tries: Counter[Point] = Counter()
    for attempt in range(MAX_ATTEMPTS):
        pending = _pending(table, wanted, tries, improve)
        if pending:
            # Shuffled, so that a slow minute of the machine does not fall on one operator alone.
            random.Random(attempt).shuffle(pending)
            _measure(table, backend, pending, path, "latency table" if attempt == 0 else "once more", progress)
            tries.update(pending)
    return table


def _pending(table: LatencyTable, wanted: list[Point], tries: Counter[Point], improve: bool) -> list[Point]:
    """Points without an entry, and those worth another attempt.

    Worth it are disturbed entries, and those of this call (``tries``) far above what their neighbours make one expect.
    """
    doubtful = {*table.disturbed(), *(point for point in tries if _surprises(table, point))}

    def again(point: Point) -> bool:
        entry = table.get(*point)
        if entry is None:
            return True
        return point in doubtful and (tries[point] if improve else entry.attempts) < MAX_ATTEMPTS

    return [point for point in wanted if again(point)]


def _surprises(table: LatencyTable, point: Point) -> bool:
    entry, expected = table.get(*point), table.expected_ms(*point)
    return entry is not None and expected is not None and entry.ms > SURPRISING * expected


def _measure(
    table: LatencyTable, backend: Backend, points: list[Point], path: Path, title: str, progress: bool
) -> None:
    """Measure ``points`` into ``table`` and its file."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    saved = time.monotonic()
    try:
        with Progress(*columns, disable=not progress) as bar:
            task = bar.add_task(title, total=len(points))
            plain = PlainProgress(bar.console, title, len(points), "operators")
            for done, (point, entry) in enumerate(backend.measure(points), start=1):
                old = table.get(*point)
                if old is not None:
                    # Another process only ever adds time: the fastest attempt is nearest to the truth.
                    entry = replace(min(old, entry, key=lambda item: item.ms), attempts=old.attempts + 1)
                table.add(*point, entry)
                bar.advance(task)
                if progress:
                    plain(done)
                if time.monotonic() - saved > _SAVE_EVERY_S:
                    table.save(path)
                    saved = time.monotonic()
    finally:
        table.save(path)
