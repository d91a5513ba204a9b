"""An estimate from the figures of a data sheet, for planning without the device. Never a measurement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mdp_mmdet3d.latency.sampling import EntryKey
from mdp_mmdet3d.latency.table import Device, Entry, MeasurementProtocol
from mdp_mmdet3d.operators import OPERATORS, OperatorSignature

_BYTES = {"float32": 4, "float16": 2, "int8": 1}
_NEVER = "1970-01-01T00:00:00.000+00:00"


@dataclass(frozen=True)
class DeviceFigures:
    """What the estimate assumes.

    Attributes:
        name: The device.
        peak_tflops: Arithmetic peak in 10^12 floating-point operations per second (two per multiply-accumulate).
        bandwidth_gb_s: Memory bandwidth in 10^9 bytes per second.
        launch_us: Time between two kernels in microseconds.
        tile: Channels are padded to multiples of this.
        efficiency: Share of the arithmetic peak that dense kernels reach.
        precision: Element type.
    """

    name: str
    peak_tflops: float
    bandwidth_gb_s: float
    launch_us: float
    tile: int = 16
    efficiency: float = 0.6
    precision: str = "float16"


class RooflineBackend:
    """Per operator the longer of arithmetic and memory traffic, plus the launches of its kernels.

    The table's device has the runtime ``"roofline"``, so it cannot be merged with or continued by measurements.

    Args:
        figures: The device.

    Raises:
        ValueError: A figure is not positive, or the precision is unknown.
    """

    def __init__(self, figures: DeviceFigures) -> None:
        for name in ("peak_tflops", "bandwidth_gb_s", "tile", "efficiency"):
            if getattr(figures, name) <= 0:
                raise ValueError(f"{name} is {getattr(figures, name)!r}, it must be positive")
        if figures.precision not in _BYTES or figures.launch_us < 0:
            raise ValueError(
                f"precision {figures.precision!r} must be one of {', '.join(_BYTES)} and launch_us "
                f"{figures.launch_us!r} at least 0"
            )
        self._figures = figures
        self.protocol = MeasurementProtocol("estimate", warmup=0, runs=1, statistic="computed", staircase=False)

    def device(self) -> Device:
        """The device and every figure that the estimate assumes."""
        f = self._figures
        stated = (
            f"{f.peak_tflops:g} TFLOP/s x {f.efficiency:g}, {f.bandwidth_gb_s:g} GB/s, {f.launch_us:g} us, "
            f"tile {f.tile}"
        )
        return Device(f.name, "roofline", stated, threads=0, precision=f.precision)

    def measure(self, keys: Iterable[EntryKey]) -> Iterator[tuple[EntryKey, Entry]]:
        """Estimate each entry."""
        for signature, widths in keys:
            yield (signature, widths), Entry(self._ms(signature, widths), spread=0.0, runs=1, time=_NEVER)

    def _ms(self, signature: OperatorSignature, widths: tuple[int, ...]) -> float:
        f, operator = self._figures, OPERATORS[signature.kind]
        # Heads are whole matrices of their own; every other width is padded to tiles.
        padded = tuple(
            width if role in operator.whole_roles else -(-width // f.tile) * f.tile
            for role, width in zip(operator.roles, widths, strict=True)
        )
        arithmetic_s = 2 * operator.work(signature, padded).macs / (f.peak_tflops * 1e12 * f.efficiency)
        work = operator.work(signature, widths)
        memory_s = work.elements * _BYTES[f.precision] / (f.bandwidth_gb_s * 1e9)
        return 1000 * max(arithmetic_s, memory_s) + work.kernels * f.launch_us / 1000
