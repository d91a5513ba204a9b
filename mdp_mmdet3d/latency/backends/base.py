"""What every latency backend offers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from mdp_mmdet3d.latency.sampling import Point
from mdp_mmdet3d.latency.table import Device, Entry, MeasurementProtocol


class Backend(Protocol):
    """Measures operators on one device.

    Attributes:
        protocol: How it measures.
    """

    protocol: MeasurementProtocol

    def fingerprint(self) -> Device:
        """Describe the device and the runtime."""

    def measure(self, points: Iterable[Point]) -> Iterator[tuple[Point, Entry]]:
        """Measure the points one after another and yield each as soon as it is known."""
