"""Measuring a pruning space into a latency table, resumable at any moment."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mdp_mmdet3d.extras import needs
from mdp_mmdet3d.latency.backends.base import Backend
from mdp_mmdet3d.latency.sampling import EntryKey, Policy, policy_entries
from mdp_mmdet3d.latency.table import LatencyTable
from mdp_mmdet3d.progress import PlainProgress
from mdp_mmdet3d.space import PruningSpace

with needs("latency", "measuring latency"):
    from rich import get_console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

MAX_ATTEMPTS = 3
SURPRISING = 1.2
_SAVE_EVERY_S = 2.0


def measure_latency(
    space: PruningSpace,
    backend: Backend,
    path: str | Path,
    *,
    policy: Policy = "grid",
    extra: Sequence[EntryKey] = (),
    improve: bool = False,
    progress: bool = True,
) -> LatencyTable:
    """Measure what ``path`` does not hold yet and return the whole table.

    The file is replaced atomically every two seconds, so a kill loses no more than that. Entries that were
    measured while the machine was busy with something else are measured again, `MAX_ATTEMPTS` times at most. A complete
    table is returned as it is.

    Args:
        space: What may be pruned; terms that do not run every frame are skipped.
        backend: What measures.
        path: Table file; it is created, or continued.
        policy: See `sampling.policy_entries`; ``"none"``: only ``extra``.
        extra: Further entries, e.g. `sampling.entries_of` a plan.
        improve: Measure disturbed entries of an earlier call again, even if nothing is missing.
        progress: Show a progress bar with the remaining time, or a line now and then where there is no terminal.

    Raises:
        FileFormatError: ``path`` holds something that is no intact latency table.
        StructureMismatchError: ``path`` was measured on another device or by another protocol.
    """
    wanted = list(dict.fromkeys([*policy_entries(space, policy), *extra]))
    path = Path(path)
    device = backend.device()
    if path.exists():
        table = LatencyTable.load(path)
        table.require(device, backend.protocol, what=f"latency table {path}")
    else:
        table = LatencyTable(device, backend.protocol)
    if not improve and all(table.get(*key) is not None for key in wanted):
        return table
    tries: Counter[EntryKey] = Counter()
    for attempt in range(MAX_ATTEMPTS):
        pending = _pending(table, wanted, tries, improve)
        if pending:
            # Shuffled, so that a slow minute of the machine does not fall on one operator alone.
            random.Random(attempt).shuffle(pending)
            _measure(table, backend, pending, path, "latency table" if attempt == 0 else "once more", progress)
            tries.update(pending)
    return table


def _pending(table: LatencyTable, wanted: list[EntryKey], tries: Counter[EntryKey], improve: bool) -> list[EntryKey]:
    """Entries without an entry, and those worth another attempt.

    Worth it are disturbed entries, and those of this call (``tries``) far above what their neighbours make one expect.
    """
    doubtful = {*table.disturbed(), *(key for key in tries if _surprises(table, key))}

    def again(key: EntryKey) -> bool:
        entry = table.get(*key)
        if entry is None:
            return True
        return key in doubtful and (tries[key] if improve else entry.attempts) < MAX_ATTEMPTS

    return [key for key in wanted if again(key)]


def _surprises(table: LatencyTable, key: EntryKey) -> bool:
    entry, expected = table.get(*key), table.expected_ms(*key)
    return entry is not None and expected is not None and entry.ms > SURPRISING * expected


def _measure(
    table: LatencyTable, backend: Backend, keys: list[EntryKey], path: Path, title: str, progress: bool
) -> None:
    """Measure ``keys`` into ``table`` and its file."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    saved = time.monotonic()
    try:
        with Progress(*columns, disable=not (progress and get_console().is_terminal)) as bar:
            task = bar.add_task(title, total=len(keys))
            plain = PlainProgress(bar.console, title, len(keys), "operators")
            for done, (key, entry) in enumerate(backend.measure(keys), start=1):
                old = table.get(*key)
                if old is not None:
                    # Another process only ever adds time: the fastest attempt is nearest to the truth.
                    entry = replace(min(old, entry, key=lambda item: item.ms), attempts=old.attempts + 1)
                table.add(*key, entry)
                bar.advance(task)
                if progress:
                    plain(done)
                if time.monotonic() - saved > _SAVE_EVERY_S:
                    table.save(path)
                    saved = time.monotonic()
    finally:
        table.save(path)
