"""ONNX Runtime on the CPU: kernel times from its profiler, one thread."""
from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.latency.graphs import operator_graph, reference_graph
from mdp_mmdet3d.latency.probe.host import processor_name, system_name
from mdp_mmdet3d.latency.probe.onnxruntime_timer import OnnxRuntimeTimer
from mdp_mmdet3d.latency.sampling import Point
from mdp_mmdet3d.latency.table import Device, Entry, MeasurementProtocol


class OnnxRuntimeBackend:
    """Times operators by ONNX Runtime's profiler in a context like the network's (``docs/latency.md``).

    Args:
        **timer: Options of `OnnxRuntimeTimer`.
    """

    def __init__(self, **timer: float) -> None:
        reference = reference_graph()
        self._timer = OnnxRuntimeTimer((reference.model.SerializeToString(), reference.inputs), **timer)  # type: ignore[arg-type]
        self.protocol = MeasurementProtocol(**self._timer.protocol())

    def fingerprint(self) -> Device:
        """Describe this machine and its ONNX Runtime."""
        return Device(processor_name(), **self._timer.runtime_fields(), system=system_name(),
                      python=platform.python_version())

    def reference_ms(self) -> float:
        """Time of the reference operator now: longer than usual while the machine is busy."""
        return self._timer.reference_ms()

    def measure(self, points: Iterable[Point]) -> Iterator[tuple[Point, Entry]]:
        """Measure each point in its own session, which is freed before the next one starts.

        Raises:
            MdpError: ONNX Runtime refuses an operator.
        """
        for signature, widths in points:
            graph = operator_graph(signature, widths)
            try:
                result = self._timer.measure(graph.model.SerializeToString(), graph.inputs, graph.copies)
            except RuntimeError as error:
                raise MdpError(f"{self.fingerprint()} cannot measure {signature.key} with widths {widths}: "
                               f"{error}") from error
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            yield (signature, widths), Entry(**result, time=now)
