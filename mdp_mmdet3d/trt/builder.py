"""The one builder of engines, with TensorRT 10.x / 11.x or TensorRT-RTX. Writes no files.

Stand-alone: Python >= 3.8, also in probe bundles. Building needs no GPU with TensorRT-RTX. Precision is in the ONNX
model, never in builder flags.
"""

from __future__ import annotations

import importlib
import re
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

_WHY_REFUSED = {
    "8.7": "Orin has no TensorRT-RTX: copy the folder to the vehicle and build there with the TensorRT of JetPack",
    "9.0": "TensorRT-RTX leaves data-centre GPUs to standard TensorRT: build there",
}


class BuildError(RuntimeError):
    """TensorRT refuses a model.

    Attributes:
        nodes: Names of the ONNX nodes that the parser names, empty where it was not the parser.
    """

    def __init__(self, message: str, nodes: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.nodes = nodes


class CapabilityError(RuntimeError):
    """TensorRT here cannot build for the compute capability that was asked for."""


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


def build_engine(
    trt: Any, model: Any, capability: str | None = None, timing_cache: bytes | None = None
) -> dict[str, Any]:
    """Build an engine from an ONNX model.

    Args:
        trt: What `load_tensorrt` returned.
        model: Serialised model (bytes), or path of one.
        capability: Compute capability to build for, e.g. ``"8.6"`` (TensorRT-RTX); None means the GPU here.
        timing_cache: That of an earlier build, empty for a new one; None means none.

    Returns:
        ``plan`` (bytes), ``plan_bytes``, ``seconds``, ``kernels``: a list of {``name``, ``type``, ``onnx_layers``} in
        the order of execution, ``timing_cache`` (bytes, None where there is none), and ``weights_bytes``,
        ``activation_bytes``, ``scratch_bytes`` (None where it is not reported).

    Raises:
        CapabilityError: The capability is refused.
        BuildError: The model cannot be parsed or built; has the names of the nodes.
    """
    logger = shared_logger(trt)
    del log_records[:]
    builder = trt.Builder(logger)
    if builder is None:
        raise BuildError("TensorRT cannot create a builder here: " + " | ".join(log_records[-3:]))
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    set_target(trt, config, capability)
    parser = trt.OnnxParser(network, logger)
    title = "the model" if isinstance(model, bytes) else str(model)
    parsed = parser.parse(model) if isinstance(model, bytes) else parser.parse_from_file(title)
    if not parsed:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        nodes = tuple(name for name in map(_node_name, errors) if name)
        lines = "\n".join(f"  node {_node_name(error) or '?'!r}: {error.desc()}" for error in errors)
        raise BuildError(f"{trt.__name__} {trt.__version__} cannot parse {title}:\n{lines}", nodes)
    has_cache = timing_cache is not None and _attach_cache(config, timing_cache)
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if plan is None:
        raise BuildError(f"{trt.__name__} {trt.__version__} cannot build {title}: " + " | ".join(log_records[-3:]))
    cache = config.get_timing_cache() if has_cache else None
    content = bytes(plan)
    result: dict[str, Any] = {"plan": content, "plan_bytes": len(content), "seconds": seconds}
    result["timing_cache"] = None if cache is None else bytes(cache.serialize())
    result["kernels"] = parse_kernels(next((r for r in log_records if r.startswith("Layers:")), ""))
    for name, pattern in MEMORY_PATTERNS.items():
        found = [match for match in map(pattern.search, log_records) if match]
        result[name] = int(found[-1].group(1)) if found else None
    return result


def engine_summary(built: dict[str, Any]) -> dict[str, Any]:
    """What `build_engine` found, without the plan and the timing cache: for reports."""
    return {key: value for key, value in built.items() if key not in ("plan", "timing_cache")}


def set_target(trt: Any, config: Any, capability: str | None) -> None:
    """Choose the compute capability; raises `CapabilityError` with the reason and what can be built."""
    if capability is None:
        return
    kinds = getattr(trt, "ComputeCapability", None)
    if kinds is None:
        raise CapabilityError(
            f"{trt.__name__} {trt.__version__} builds only for the GPU of this machine, not for {capability}: "
            "leave --capability out and run on the target"
        )
    names = sorted(name for name in dir(kinds) if name.startswith("SM") and name[2:].isdigit())
    name = "SM" + capability.replace(".", "")
    if name in names:
        config.num_compute_capabilities = 1
        if config.set_compute_capability(getattr(kinds, name), 0):
            return
    reason = _WHY_REFUSED.get(capability, f"known are {', '.join(f'{n[2:-1]}.{n[-1]}' for n in names)}")
    raise CapabilityError(
        f"{trt.__name__} {trt.__version__} cannot build for compute capability {capability}. {reason}"
    )


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


def _node_name(error: Any) -> str:
    """The parser's name of the node; not in every version."""
    return str(error.node_name()) if hasattr(error, "node_name") else ""


def _attach_cache(config: Any, content: bytes) -> bool:
    """Attach the timing cache; False where this TensorRT has none."""
    if not hasattr(config, "create_timing_cache"):
        return False
    cache = config.create_timing_cache(content)
    if cache is None and content:  # written by another version or for another device
        cache = config.create_timing_cache(b"")
    # TensorRT-RTX times nothing when it builds and may refuse one.
    return cache is not None and bool(config.set_timing_cache(cache, False))
