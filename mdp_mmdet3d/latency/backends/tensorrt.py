"""TensorRT 10.x / 11.x and TensorRT-RTX: builds engines anywhere, times them where a GPU is."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mdp_mmdet3d.device import system_name
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.latency.graphs import Precision, operator_graph, reference_graph
from mdp_mmdet3d.latency.probe.tensorrt_timer import TensorRtTimer
from mdp_mmdet3d.latency.sampling import EntryKey
from mdp_mmdet3d.latency.table import Device, Entry, MeasurementProtocol
from mdp_mmdet3d.trt.builder import build_engine, engine_summary, load_tensorrt


class TensorRtBackend:
    """Times operators by TensorRT's layer profiler on the GPU of this machine.

    Args:
        precision: Element type of the operators.

    Raises:
        MdpError: TensorRT, the CUDA runtime library or a GPU is missing.
    """

    def __init__(self, precision: Precision = "float32") -> None:
        reference = reference_graph(precision)
        try:
            self._timer = TensorRtTimer((reference.model.SerializeToString(), reference.inputs), precision=precision)
        except (ImportError, RuntimeError) as error:
            raise MdpError(
                f"TensorRT cannot measure here: {error}. Make a probe bundle (tools/profile_latency.py "
                "CONFIG --bundle F.zip) and run it on the target"
            ) from error
        self._precision = precision
        self.protocol = MeasurementProtocol(**self._timer.protocol())

    def device(self) -> Device:
        """Describe the GPU and the runtime."""
        return Device(
            self._timer.processor,
            **self._timer.runtime_fields(),
            system=f"{system_name()}, {self._timer.driver}",
            python=platform.python_version(),
        )

    def measure(self, keys: Iterable[EntryKey]) -> Iterator[tuple[EntryKey, Entry]]:
        """Build, load and time one engine per entry; raises `MdpError` where TensorRT refuses one."""
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


def build_report(model: bytes | str | Path, capability: str | None = None) -> dict[str, Any]:
    """Build an engine and report its kernels and memory; needs no GPU with TensorRT-RTX.

    Args:
        model: ONNX model or its path.
        capability: Compute capability, e.g. ``"8.6"``; None for the GPU here.

    Returns:
        ``kernels`` (name, type and ONNX nodes of each), ``plan_bytes``, ``weights_bytes``, ``activation_bytes``,
        ``scratch_bytes``, ``seconds``.

    Raises:
        MdpError: TensorRT is missing or refuses the model or the capability.
    """
    try:
        return engine_summary(build_engine(load_tensorrt(), model, capability))
    except (ImportError, RuntimeError) as error:
        raise MdpError(
            f"TensorRT cannot build {model if not isinstance(model, bytes) else 'the model'}: {error}"
        ) from error
