"""A deployment folder of either kind, ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime.graph_manifest import GraphManifest, load_manifest
from mdp_mmdet3d.runtime.graph_runner import GraphRunner
from mdp_mmdet3d.runtime.stream import StreamRunner


class Runner(Protocol):
    """What measuring and validation call; frames and outputs are of the runner's own kind."""

    folder: Path
    manifest: Any

    def start(self, frame: Any) -> bool:
        """Compute what is computed once, before a stream, and again only if it changed; whether it did."""

    def reset(self) -> None:
        """Forget the past."""

    def step(self, frame: Any) -> Any:
        """Run one frame; the output has ``engines_ms``."""

    def run(self, frame: Any) -> Any:
        """Start where that is due, then `step`."""

    def decode(self, output: Any) -> Any:
        """What the host gets."""

    def gpu_used_mib(self) -> float | None:
        """Memory of the GPU in use, by all processes, in MiB; None where the engines run on no GPU."""

    def backend_info(self) -> dict[str, Any]:
        """What runs the engines, with its version."""


def load_runner(folder: str | Path, threads: int = 1, backend: str = "onnxruntime") -> Runner:
    """Load the engines of a folder.

    Args:
        folder: Deployment folder.
        threads: Threads inside one operator (ONNX Runtime).
        backend: ``"onnxruntime"``, or ``"tensorrt"`` for a streaming deployment.

    Raises:
        FileFormatError: The folder is incomplete or its files have changed.
        DeploymentError: An engine cannot be loaded, or not by this backend.
    """
    if not isinstance(load_manifest(folder), GraphManifest):
        return StreamRunner(folder, threads, backend)
    if backend != GraphRunner.backend:
        raise DeploymentError(f"{folder} is a single graph: it runs with --backend {GraphRunner.backend} here")
    return GraphRunner(folder, threads)
