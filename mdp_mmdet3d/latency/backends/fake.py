"""A deterministic backend for tests: latency is computed, nothing runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from mdp_mmdet3d.latency.sampling import EntryKey
from mdp_mmdet3d.latency.table import Device, Entry, MeasurementProtocol
from mdp_mmdet3d.operators import OperatorSignature

_TIME = "2000-01-01T00:00:00+00:00"


def product_cost(signature: OperatorSignature, widths: tuple[int, ...]) -> float:
    """A microsecond per call plus a nanosecond per product of widths."""
    cost = 1.0
    for width in widths:
        cost *= width
    return 1e-3 + 1e-6 * cost


class FakeBackend:
    """Yields ``cost(signature, widths)`` as milliseconds.

    Args:
        cost: Latency model.
        processor: Name of the device that it pretends to be.
    """

    def __init__(
        self,
        cost: Callable[[OperatorSignature, tuple[int, ...]], float] = product_cost,
        processor: str = "fake processor",
    ) -> None:
        self.protocol = MeasurementProtocol("computed", warmup=0, runs=1, statistic="minimum", staircase=False)
        self.calls: list[EntryKey] = []
        self._cost = cost
        self._processor = processor

    def device(self) -> Device:
        """Describe the pretended device."""
        return Device(self._processor, "fake", "1", threads=1, precision="float32")

    def measure(self, keys: Iterable[EntryKey]) -> Iterator[tuple[EntryKey, Entry]]:
        """Yield the computed latency of each entry and remember in `calls` that it was asked for."""
        for signature, widths in keys:
            self.calls.append((signature, widths))
            yield (signature, widths), Entry(self._cost(signature, widths), spread=0.0, runs=1, time=_TIME)
