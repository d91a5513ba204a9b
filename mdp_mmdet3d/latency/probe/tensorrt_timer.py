"""Builds and times operators with TensorRT 10.x / 11.x or TensorRT-RTX. Stand-alone: Python >= 3.8.

Building needs no GPU with TensorRT-RTX; timing needs one, and the CUDA runtime library.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import re
import statistics
import time
from typing import Any

_KERNEL = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]*),", re.MULTILINE)
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
MEMORY_PATTERNS = {
    "weights_bytes": re.compile(r"Total Weights Memory: (\d+) bytes"),
    "activation_bytes": re.compile(r"Total Activation Memory: (\d+) bytes"),
    "scratch_bytes": re.compile(r"Max Scratch Memory: (\d+) bytes"),
}
log_records: list[str] = []
_logger: Any = None


def load_tensorrt() -> Any:
    """The module ``tensorrt`` or, failing that, ``tensorrt_rtx``; raises `ImportError` if there is neither."""
    errors = []
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            errors.append(str(error))
    raise ImportError("neither tensorrt nor tensorrt_rtx can be imported (" + "; ".join(errors) + ")")


def shared_logger(trt: Any) -> Any:
    """The one logger that a process may have; it keeps every record for `build_engine`."""
    global _logger
    if _logger is None:

        class Recorder(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                log_records.append(message)

        _logger = Recorder()
    return _logger


def build_engine(trt: Any, model: Any, capability: str | None = None) -> dict[str, Any]:
    """Build an engine from an ONNX model.

    Args:
        trt: What `load_tensorrt` returned.
        model: Serialised model (bytes), or path of one.
        capability: Compute capability to build for, e.g. ``"8.6"`` (TensorRT-RTX); None means the GPU here.

    Returns:
        ``plan`` (bytes), ``seconds``, ``kernels``: a list of {``name``, ``type``, ``onnx_layers``} in the order of
        execution, and ``weights_bytes``, ``activation_bytes``, ``scratch_bytes`` (None where it is not reported).

    Raises:
        RuntimeError: The model cannot be parsed or built, or not for this capability.
    """
    logger = shared_logger(trt)
    del log_records[:]
    builder = trt.Builder(logger)
    if builder is None:
        raise RuntimeError("TensorRT cannot create a builder here: " + " | ".join(log_records[-3:]))
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(model) if isinstance(model, bytes) else parser.parse_from_file(str(model))
    if not parsed:
        errors = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise RuntimeError("TensorRT cannot parse the model: " + "; ".join(errors))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if capability is not None:
        _set_capability(trt, config, capability)
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT cannot build the engine: " + " | ".join(log_records[-3:]))
    result: dict[str, Any] = {"plan": bytes(plan), "seconds": time.perf_counter() - start}
    result["kernels"] = parse_kernels(next((r for r in log_records if r.startswith("Layers:")), ""))
    for name, pattern in MEMORY_PATTERNS.items():
        found = [match for match in map(pattern.search, log_records) if match]
        result[name] = int(found[-1].group(1)) if found else None
    return result


def _set_capability(trt: Any, config: Any, capability: str) -> None:
    kinds = getattr(trt, "ComputeCapability", None)
    name = "SM" + capability.replace(".", "")
    known = [kind for kind in dir(kinds) if kind.startswith("SM")] if kinds is not None else []
    if name not in known:
        raise RuntimeError(
            f"{trt.__name__} {trt.__version__} cannot build for compute capability {capability}; "
            f"it knows {', '.join(known) or 'only the GPU it runs on'}"
        )
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(getattr(kinds, name), 0):
        raise RuntimeError(f"{trt.__name__} {trt.__version__} refuses compute capability {capability}")


def parse_kernels(record: str) -> list[dict[str, Any]]:
    """Kernels of a verbose ``Layers:`` record: name, type and the ONNX nodes that each of them runs."""
    kernels = []
    for line in record.splitlines():
        match = _KERNEL.match(line)
        if match and match.group("type") not in ("signal", "wait"):
            kernels.append(
                {"name": match.group("name"), "type": match.group("type"), "onnx_layers": _ONNX_LAYER.findall(line)}
            )
    return kernels


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


class Cuda:
    """The few functions of the CUDA runtime library that timing needs; raises `RuntimeError` where they fail."""

    def __init__(self) -> None:
        names = [
            ctypes.util.find_library("cudart"),
            "libcudart.so",
            "libcudart.so.13",
            "libcudart.so.12",
            "libcudart.so.11.0",
        ]
        for name in filter(None, names):
            try:
                self._library = ctypes.CDLL(name)
                break
            except OSError:
                continue
        else:
            raise RuntimeError("the CUDA runtime library (libcudart) is not found; add its folder to LD_LIBRARY_PATH")
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        self._call("cudaGetDeviceCount", ctypes.byref(count))
        if count.value < 1:
            raise RuntimeError("no CUDA device is visible")
        self._stream = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(self._stream))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: {self._library.cudaGetErrorString(status).decode()}")

    def device_name(self) -> str:
        """Name of device 0: the first field of its properties."""
        properties = ctypes.create_string_buffer(8192)
        name = "cudaGetDeviceProperties_v2"
        self._call(name if hasattr(self._library, name) else "cudaGetDeviceProperties", properties, 0)
        return properties.value.decode()

    def driver_version(self) -> str:
        """CUDA version of the driver."""
        version = ctypes.c_int()
        self._call("cudaDriverGetVersion", ctypes.byref(version))
        return f"CUDA driver {version.value // 1000}.{version.value % 1000 // 10}"

    def stream(self) -> int:
        """Handle of the one stream."""
        return int(self._stream.value or 0)

    def synchronize(self, stream: int) -> None:
        """Wait for everything on ``stream``."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def allocate(self, size: int) -> int:
        """Zeroed device memory of ``size`` bytes."""
        pointer = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        self._call("cudaMemset", pointer, 0, ctypes.c_size_t(size))
        return int(pointer.value or 0)

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cudaFree", ctypes.c_void_p(address))


class DeviceBuffer:
    """Device memory that lives as long as this object."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda = cuda
        self.address = cuda.allocate(size)

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._cuda.free(self.address)


def engine_summary(built: dict[str, Any]) -> dict[str, Any]:
    """What `build_engine` found, without the plan itself: for reports."""
    return {**{key: value for key, value in built.items() if key != "plan"}, "plan_bytes": len(built["plan"])}
