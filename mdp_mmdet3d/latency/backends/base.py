"""What every latency backend offers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from mdp_mmdet3d.latency.sampling import EntryKey
from mdp_mmdet3d.latency.table import Device, Entry, MeasurementProtocol


class Backend(Protocol):
    """Measures operators on one device.

    Attributes:
        protocol: How it measures.
    """

    protocol: MeasurementProtocol

    def device(self) -> Device:
        """Describe the device and the runtime."""

    def measure(self, keys: Iterable[EntryKey]) -> Iterator[tuple[EntryKey, Entry]]:
        """Measure the entries one after another and yield each as soon as it is known."""
