"""TensorRT engines of a deployment folder: one code path for TensorRT 10.x, 11.x and TensorRT-RTX.

Precision is in the ONNX files, never in builder flags. TensorRT-RTX builds without a GPU for a named compute
capability; standard TensorRT builds for the GPU of the machine it runs on.
"""

from __future__ import annotations

import platform
import re
from collections import Counter
from pathlib import Path
from typing import Any

from mdp_mmdet3d.errors import DeploymentError, FileFormatError
from mdp_mmdet3d.files import atomic_path, file_sha256, read_json, write_json
from mdp_mmdet3d.together import appear_together
from mdp_mmdet3d.trt import builder

ENGINES_FILE = "engines.json"
TIMING_CACHE_FILE = "timing.cache"
SCHEMA_VERSION = 1
ONNX_SUFFIX = ".onnx"
CONVOLUTION = re.compile(r"(^|/)Conv(_\d+)?$")  # name of an exported node


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


def build_engines(folder: str | Path, manifest: Any, capability: str | None = None) -> dict[str, Any]:
    """Build an engine of every ONNX file of a deployment, with a timing cache that a second build reuses.

    Writes ``<name>.<target>.engine``, ``engines.json`` (what they belong to; kernels and memory of each) and
    ``timing.cache`` into the folder: the engines and their list together or not at all, the cache after each engine.

    Args:
        folder: Deployment folder.
        manifest: Its manifest, as `runtime.graph_manifest.load_manifest` reads and checks it.
        capability: Compute capability, e.g. ``"8.6"``; None means the GPU here.

    Returns:
        What was built, name -> ``kernels``, ``seconds``, ``plan_bytes``, ``weights_bytes``, ``activation_bytes``,
        ``scratch_bytes``.

    Raises:
        DeploymentError: There is no TensorRT. `TargetError`, `EngineBuildError`: see there.
        FileFormatError: ``engines.json`` of an earlier build is damaged.
        WriteError: The folder cannot be written.
    """
    folder = Path(folder)
    trt = import_tensorrt()
    target = f"sm{capability.replace('.', '')}" if capability else "here"
    cache = folder / f"{target}.{TIMING_CACHE_FILE}"
    existing = read_engines(folder)["targets"] if (folder / ENGINES_FILE).is_file() else {}
    files = {name: f"{name}.{target}.engine" for name in manifest.engines}
    built = {}
    with appear_together(folder, (*files.values(), ENGINES_FILE)) as part:
        for name, spec in manifest.engines.items():
            plan, report = build_engine(trt, folder / spec.file, capability, cache)
            path = part / files[name]
            path.write_bytes(plan)
            built[name] = {
                "file": path.name,
                "sha256": file_sha256(path),
                "onnx_sha256": manifest.checksums[spec.file],
                **report,
            }
        existing[target] = {
            "library": trt.__name__,
            "version": trt.__version__,
            "capability": capability,
            "machine": platform.machine(),
            "precision": manifest.precision,
            "engines": built,
        }
        write_json(part / ENGINES_FILE, {"schema_version": SCHEMA_VERSION, "targets": existing})
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
        return builder.load_tensorrt()
    except ImportError as error:
        raise DeploymentError(
            f"{error}. On a Jetson use the system's Python (JetPack has TensorRT); on a host install tensorrt_rtx"
        ) from error


def build_engine(trt: Any, path: Path, capability: str | None, cache_file: Path) -> tuple[bytes, dict[str, Any]]:
    """Build one engine with `mdp_mmdet3d.trt.builder`; returns the plan and its report.

    Args:
        trt: ``tensorrt`` or ``tensorrt_rtx``.
        path: ONNX file.
        capability: E.g. ``"8.9"``; None for the GPU here.
        cache_file: Timing cache, read if it is there and written.

    Raises:
        TargetError: The capability is refused.
        EngineBuildError: The graph is refused; has the names of the nodes.
    """
    try:
        cache = cache_file.read_bytes() if cache_file.is_file() else b""
        built = builder.build_engine(trt, path, capability, cache)
    except builder.CapabilityError as error:
        raise TargetError(str(error)) from error
    except builder.BuildError as error:
        raise EngineBuildError(str(error), error.nodes) from error
    if built["timing_cache"] is not None:
        with atomic_path(cache_file) as temporary:
            temporary.write_bytes(built["timing_cache"])
    return built["plan"], builder.engine_summary(built)


def split_convolutions(report: dict[str, Any]) -> tuple[int, int]:
    """How many convolutions run in more than one kernel, and how many there are.

    An int8 convolution whose scale, ReLU or sum is a kernel of its own passes its int32 sums through memory.
    """
    kernels: Counter[str] = Counter()
    for kernel in report["kernels"]:
        kernels.update({name for name in kernel["onnx_layers"] if CONVOLUTION.search(name)})
    return sum(count > 1 for count in kernels.values()), len(kernels)


def kernel_types(report: dict[str, Any]) -> Counter[str]:
    """How many kernels of each type an engine runs."""
    return Counter(kernel["type"] for kernel in report["kernels"])
