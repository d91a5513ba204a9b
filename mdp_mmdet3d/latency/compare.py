"""Differences between two latency tables."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from mdp_mmdet3d.latency.sampling import EntryKey
from mdp_mmdet3d.latency.table import Device, LatencyTable
from mdp_mmdet3d.operators import OPERATORS


@dataclass(frozen=True)
class Comparison:
    """Entries of two tables side by side.

    Attributes:
        ratios: Second over first, for each entry that both hold with a positive time.
        only_first: Entries that only the first table holds.
        only_second: Entries that only the second table holds.
    """

    ratios: dict[EntryKey, float]
    only_first: list[EntryKey]
    only_second: list[EntryKey]


def compare_tables(first: LatencyTable, second: LatencyTable) -> Comparison:
    """Compare what two tables hold; they may be of different devices."""
    left = {(signature, widths): entry.ms for signature, widths, entry in first}
    right = {(signature, widths): entry.ms for signature, widths, entry in second}
    return Comparison(
        {key: right[key] / ms for key, ms in left.items() if key in right and ms > 0},
        [key for key in left if key not in right],
        [key for key in right if key not in left],
    )


def print_comparison(comparison: Comparison, first: Device, second: Device, console: Console, rows: int = 10) -> None:
    """Print the distribution of ratios per operator kind and the largest deviations from the median.

    Args:
        comparison: What `compare_tables` found.
        first: Device of the first table.
        second: Device of the second.
        console: Where to print.
        rows: How many deviating entries to list.
    """
    console.print(f"first:  {first}\nsecond: {second}", highlight=False)
    console.print(
        f"{len(comparison.ratios)} common entries, {len(comparison.only_first)} only in the first, "
        f"{len(comparison.only_second)} only in the second"
    )
    if not comparison.ratios:
        return
    summary = Table("operator", "entries", "median", "smallest", "largest", title="second / first")
    for kind in OPERATORS:
        values = [ratio for (signature, _), ratio in comparison.ratios.items() if signature.kind == kind]
        if values:
            figures = (statistics.median(values), min(values), max(values))
            summary.add_row(kind, str(len(values)), *(f"{value:.3f}" for value in figures))
    console.print(summary)
    middle = statistics.median(comparison.ratios.values())
    far = sorted(comparison.ratios.items(), key=lambda item: -abs(item[1] / middle - 1))[:rows]
    details = Table("ratio", "operator", "widths", title=f"farthest from the median {middle:.3f}")
    for (signature, widths), ratio in far:
        details.add_row(f"{ratio:.3f}", signature.key, str(widths))
    console.print(details)
