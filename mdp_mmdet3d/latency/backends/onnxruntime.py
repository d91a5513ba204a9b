"""ONNX Runtime: kernel times from its profiler on the CPU (one thread), wall clock on a GPU."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from typing import Literal

from mdp_mmdet3d.device import processor_name, system_name
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.extras import needs
from mdp_mmdet3d.latency.graphs import Precision, operator_graph, reference_graph
from mdp_mmdet3d.latency.sampling import EntryKey
from mdp_mmdet3d.latency.table import Device, Entry, MeasurementProtocol

with needs("latency", "measuring with ONNX Runtime"):
    from mdp_mmdet3d.latency.backends.onnxruntime_gpu import GpuTimer
    from mdp_mmdet3d.latency.probe.onnxruntime_timer import OnnxRuntimeTimer

Provider = Literal["cpu", "cuda", "tensorrt"]


class OnnxRuntimeBackend:
    """Times operators in a context like the network's (``docs/latency.md``).

    Args:
        provider: ``"cpu"``, or ``"cuda"`` and ``"tensorrt"`` for the execution providers of an ONNX Runtime with GPU
            support. Another provider is never taken instead.
        precision: Element type of the operators; ``"float16"`` on a GPU only.
        **timer: Options of `OnnxRuntimeTimer`, or of `GpuTimer`.

    Raises:
        MdpError: The provider is not there, cannot be used, or not in this precision.
    """

    def __init__(self, provider: Provider = "cpu", precision: Precision = "float32", **timer: float) -> None:
        graph = reference_graph(precision)
        reference = (graph.model.SerializeToString(), graph.inputs)
        self._timer: OnnxRuntimeTimer | GpuTimer
        if provider == "cpu":
            if precision != "float32":
                raise MdpError(
                    f"ONNX Runtime on the CPU is measured in float32, not in {precision}; use a GPU "
                    "(--backend tensorrt, onnxruntime-cuda, onnxruntime-tensorrt or torch)"
                )
            self._timer = OnnxRuntimeTimer(reference, **timer)  # type: ignore[arg-type]
            self._processor = processor_name()
        else:
            try:
                self._timer = GpuTimer(reference, provider, precision, **timer)  # type: ignore[arg-type]
            except RuntimeError as error:
                raise MdpError(f"backend onnxruntime-{provider} cannot be used here: {error}") from error
            self._processor = self._timer.processor
        self._precision = precision
        self.protocol = MeasurementProtocol(**self._timer.protocol())

    def device(self) -> Device:
        """Describe this machine and its ONNX Runtime."""
        return Device(
            self._processor, **self._timer.runtime_fields(), system=system_name(), python=platform.python_version()
        )

    def reference_ms(self) -> float:
        """Time of the reference operator now: longer than usual while the machine is busy."""
        return self._timer.reference_ms()

    def measure(self, keys: Iterable[EntryKey]) -> Iterator[tuple[EntryKey, Entry]]:
        """Measure each entry in its own session, which is freed before the next one starts.

        Raises:
            MdpError: ONNX Runtime refuses an operator.
        """
        for signature, widths in keys:
            graph = operator_graph(signature, widths, self._precision)
            try:
                result = self._timer.measure(graph.model.SerializeToString(), graph.inputs, graph.copies)
            except RuntimeError as error:
                raise MdpError(
                    f"{self.device()} cannot measure {signature.key} with widths {widths}: {error}"
                ) from error
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            yield (signature, widths), Entry(**result, time=now)
