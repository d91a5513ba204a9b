"""Times operators with TensorRT 10.x / 11.x or TensorRT-RTX on the GPU here. Python >= 3.8."""

from __future__ import annotations

import statistics
from typing import Any

from mdp_mmdet3d.trt.builder import build_engine, load_tensorrt, log_records, shared_logger
from mdp_mmdet3d.trt.cuda import Cuda, DeviceBuffer


def kernel_signs(kernels: list[dict[str, Any]]) -> dict[str, int]:
    """Per kernel 1 if it belongs to the measured operator, -1 if it is an offset, 0 if it is only context.

    A kernel that runs no ONNX node moves data for the next one that does.
    """
    signs = {}
    sign = 0
    for kernel in reversed(kernels):
        if any(layer.startswith("target") for layer in kernel["onnx_layers"]):
            sign = 1
        elif kernel["onnx_layers"]:
            sign = -1 if any(layer.startswith("offset") for layer in kernel["onnx_layers"]) else 0
        signs[kernel["name"]] = sign
    return signs


class TensorRtTimer:
    """Times small models whose tensors are named as in `mdp_mmdet3d.latency.graphs`, on the GPU here.

    Args:
        reference: Model of the reference operator (bytes or path) and the shapes of its inputs.
        precision: Element type of the models.
        warmup: Runs that are thrown away.
        runs: Runs that count.

    Raises:
        ImportError: There is no TensorRT.
        RuntimeError: There is no GPU, or no CUDA runtime library.
    """

    def __init__(
        self, reference: tuple[Any, dict[str, Any]], *, precision: str = "float32", warmup: int = 20, runs: int = 50
    ) -> None:
        self._trt = load_tensorrt()
        self._cuda = Cuda()
        self._precision, self._warmup, self._runs = precision, warmup, runs
        self.processor = self._cuda.device_name()
        self.driver = self._cuda.driver_version()
        self._reference = self._load(*reference)
        self._before = self.reference_ms()

    def runtime_fields(self) -> dict[str, Any]:
        """The fields of a table's ``device`` that the runtime decides."""
        return {
            "runtime": self._trt.__name__,
            "runtime_version": self._trt.__version__,
            "threads": 0,
            "precision": self._precision,
        }

    def protocol(self) -> dict[str, Any]:
        """A table's ``protocol``."""
        return {
            "name": "layer time in a sandwich",
            "warmup": self._warmup,
            "runs": self._runs,
            "statistic": "sum over layers of the median",
            "staircase": False,
        }

    def reference_ms(self) -> float:
        """Fastest of a few runs of the reference operator."""
        times = self._layer_ms(self._reference, 5, 10)
        return sum(min(values) for values in times.values())

    def measure(self, model: Any, inputs: dict[str, Any], copies: int) -> dict[str, Any]:
        """Measure one model; see `OnnxRuntimeTimer.measure`."""
        loaded = self._load(model, inputs)
        times = self._layer_ms(loaded, self._warmup, self._runs)
        signs = kernel_signs(loaded["kernels"])
        unknown = [name for name in times if name not in signs]
        if unknown or 1 not in signs.values():
            raise RuntimeError(
                f"TensorRT's profiler names the layers {unknown or sorted(times)}, which do not match "
                f"the kernels of the build {sorted(signs)}"
            )
        totals = [sum(signs[name] * values[run] for name, values in times.items()) for run in range(self._runs)]
        ms = sum(signs[name] * statistics.median(values) for name, values in times.items()) / copies
        after = self.reference_ms()
        busiest, self._before = max(self._before, after), after
        return {
            "ms": max(ms, 0.0),
            "spread": (max(totals) - min(totals)) / abs(statistics.median(totals)),
            "runs": self._runs,
            "reference_ms": busiest,
        }

    def _load(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        trt = self._trt
        built = build_engine(trt, model)
        runtime = trt.Runtime(shared_logger(trt))
        engine = runtime.deserialize_cuda_engine(built["plan"])
        if engine is None:
            raise RuntimeError("TensorRT cannot load the engine that it built: " + " | ".join(log_records[-3:]))
        context = engine.create_execution_context()
        buffers = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            size = 4
            for extent in engine.get_tensor_shape(name):
                size *= extent
            buffers.append(DeviceBuffer(self._cuda, size))
            context.set_tensor_address(name, buffers[-1].address)
        return {
            "runtime": runtime,
            "engine": engine,
            "context": context,
            "buffers": buffers,
            "kernels": built["kernels"],
        }

    def _layer_ms(self, loaded: dict[str, Any], warmup: int, runs: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {}

        class Profiler(self._trt.IProfiler):  # type: ignore[name-defined]
            def __init__(self, trt: Any) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times.setdefault(layer_name, []).append(ms)

        profiler = Profiler(self._trt)
        context = loaded["context"]
        context.profiler = profiler
        stream = self._cuda.stream()
        for _ in range(warmup + runs):
            if not context.execute_async_v3(stream):
                raise RuntimeError("TensorRT cannot run the engine: " + " | ".join(log_records[-3:]))
            self._cuda.synchronize(stream)
        return {name: values[warmup:] for name, values in times.items()}
