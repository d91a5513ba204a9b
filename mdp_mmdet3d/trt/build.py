"""TensorRT engines of a deployment folder: one code path for TensorRT 10.x, 11.x and TensorRT-RTX.

Precision is in the ONNX files, never in builder flags. TensorRT-RTX builds without a GPU for a named compute
capability; standard TensorRT builds for the GPU of the machine it runs on.
"""

from __future__ import annotations

import platform
from collections import Counter
from pathlib import Path
from typing import Any

from mdp_mmdet3d.errors import DeploymentError, FileFormatError
from mdp_mmdet3d.files import atomic_path, file_sha256, read_json, write_json
from mdp_mmdet3d.latency.probe import tensorrt_timer
from mdp_mmdet3d.runtime.graph_manifest import load_manifest

ENGINES_FILE = "engines.json"
TIMING_CACHE_FILE = "timing.cache"
SCHEMA_VERSION = 1
ONNX_SUFFIX = ".onnx"

_WHY_REFUSED = {
    "8.7": "Orin has no TensorRT-RTX: copy the folder to the vehicle and build there with the TensorRT of JetPack",
    "9.0": "TensorRT-RTX leaves data-centre GPUs to standard TensorRT: build there",
}


class EngineBuildError(DeploymentError):
    """TensorRT refuses a graph.

    Attributes:
        nodes: Names of the ONNX nodes that the parser names, empty where it was not the parser.
    """

    def __init__(self, message: str, nodes: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.nodes = nodes


class TargetError(DeploymentError):
    """TensorRT here cannot build for the compute capability that was asked for."""


def build_engines(folder: str | Path, capability: str | None = None) -> dict[str, Any]:
    """Build an engine of every ONNX file of a deployment, with a timing cache that a second build reuses.

    Writes ``<name>.<target>.engine``, ``engines.json`` (what they belong to; kernels and memory of each) and
    ``timing.cache`` into the folder.

    Args:
        folder: Deployment folder.
        capability: Compute capability, e.g. ``"8.6"``; None means the GPU here.

    Returns:
        What was built, name -> ``kernels``, ``seconds``, ``plan_bytes``, ``weights_bytes``, ``activation_bytes``,
        ``scratch_bytes``.

    Raises:
        DeploymentError: There is no TensorRT. `TargetError`, `EngineBuildError`: see there.
        FileFormatError: The deployment is incomplete, or its files have changed.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    trt = import_tensorrt()
    target = f"sm{capability.replace('.', '')}" if capability else "here"
    cache = folder / f"{target}.{TIMING_CACHE_FILE}"
    built = {}
    for name, spec in manifest.engines.items():
        plan, report = build_engine(trt, folder / spec.file, capability, cache)
        file = f"{name}.{target}.engine"
        with atomic_path(folder / file) as temporary:
            temporary.write_bytes(plan)
        built[name] = {
            "file": file,
            "sha256": file_sha256(folder / file),
            "onnx_sha256": manifest.checksums[spec.file],
            **report,
        }
    existing = read_engines(folder)["targets"] if (folder / ENGINES_FILE).is_file() else {}
    existing[target] = {
        "library": trt.__name__,
        "version": trt.__version__,
        "capability": capability,
        "machine": platform.machine(),
        "precision": manifest.precision,
        "engines": built,
    }
    write_json(folder / ENGINES_FILE, {"schema_version": SCHEMA_VERSION, "targets": existing})
    return built


def read_engines(folder: str | Path) -> dict[str, Any]:
    """Read ``engines.json``; raises `FileFormatError`."""
    path = Path(folder) / ENGINES_FILE
    data = read_json(path, what="list of engines (tools/build_engine.py)", schema_version=SCHEMA_VERSION)
    if not isinstance(data.get("targets"), dict):
        raise FileFormatError(f"{path} lists no targets; run tools/build_engine.py again")
    return data


def import_tensorrt() -> Any:
    """The TensorRT module of this machine; `DeploymentError` if there is none."""
    try:
        return tensorrt_timer.load_tensorrt()
    except ImportError as error:
        raise DeploymentError(
            f"{error}. On a Jetson use the system's Python (JetPack has TensorRT); on a host install tensorrt_rtx"
        ) from error


def build_engine(trt: Any, path: Path, capability: str | None, cache_file: Path) -> tuple[bytes, dict[str, Any]]:
    """Build one engine; returns the plan and its report.

    Args:
        trt: ``tensorrt`` or ``tensorrt_rtx``.
        path: ONNX file.
        capability: E.g. ``"8.9"``; None for the GPU here.
        cache_file: Timing cache, read if it is there and written.

    Raises:
        TargetError: The capability is refused.
        EngineBuildError: The graph is refused; has the names of the nodes.
    """
    logger = tensorrt_timer.shared_logger(trt)
    # A process has one logger; the timer's keeps its records for its own builds in this list.
    records = tensorrt_timer.log_records
    del records[:]
    builder = trt.Builder(logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    set_target(trt, config, capability)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        nodes = tuple(name for name in map(_node_name, errors) if name)
        lines = "\n".join(f"  node {_node_name(error) or '?'!r}: {error.desc()}" for error in errors)
        raise EngineBuildError(f"{trt.__name__} {trt.__version__} cannot parse {path}:\n{lines}", nodes)
    has_cache = _load_cache(config, cache_file)
    start_seconds = tensorrt_timer.time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = tensorrt_timer.time.perf_counter() - start_seconds
    if plan is None:
        raise EngineBuildError(f"{trt.__name__} {trt.__version__} cannot build {path}: " + " | ".join(records[-3:]))
    if has_cache:
        _save_cache(config, cache_file)
    plan = bytes(plan)
    kernels = tensorrt_timer.parse_kernels(next((text for text in records if text.startswith("Layers:")), ""))
    memory = {}
    for name, pattern in tensorrt_timer.MEMORY_PATTERNS.items():
        found = [match for match in map(pattern.search, records) if match]
        memory[name] = int(found[-1].group(1)) if found else None
    return plan, {"kernels": kernels, "seconds": seconds, "plan_bytes": len(plan), **memory}


def set_target(trt: Any, config: Any, capability: str | None) -> None:
    """Choose the compute capability; raises `TargetError` with the reason and what can be built."""
    if capability is None:
        return
    kinds = getattr(trt, "ComputeCapability", None)
    if kinds is None:
        raise TargetError(
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
    raise TargetError(f"{trt.__name__} {trt.__version__} cannot build for compute capability {capability}. {reason}")


def kernel_types(report: dict[str, Any]) -> Counter[str]:
    """How many kernels of each type an engine runs."""
    return Counter(kernel["type"] for kernel in report["kernels"])


def _node_name(error: Any) -> str:
    """The parser's name of the node; not in every version."""
    return str(error.node_name()) if hasattr(error, "node_name") else ""


def _load_cache(config: Any, path: Path) -> bool:
    """Attach the timing cache; False where this TensorRT has none."""
    if not hasattr(config, "create_timing_cache"):
        return False
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None and path.is_file():  # written by another version or for another device
        path.unlink()
        cache = config.create_timing_cache(b"")
    # TensorRT-RTX times nothing when it builds and may refuse one.
    return cache is not None and bool(config.set_timing_cache(cache, False))


def _save_cache(config: Any, path: Path) -> None:
    cache = config.get_timing_cache()
    if cache is not None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(bytes(cache.serialize()))
