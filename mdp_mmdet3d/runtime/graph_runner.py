"""Runs a deployment of one graph without memory: image in, raw outputs of the heads out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime.graph_manifest import GraphManifest
from mdp_mmdet3d.runtime.ort_engine import OrtEngine

ENGINE = "model"


@dataclass(frozen=True)
class GraphOutput:
    """What one image gave.

    Attributes:
        tensors: Outputs by name.
        engines_ms: Wall-clock milliseconds of the graph, under its name.
    """

    tensors: Mapping[str, np.ndarray]
    engines_ms: Mapping[str, float]


class GraphRunner:
    """An exported single graph on ONNX Runtime, with the calls that `measure_interleaved` and `validate` make.

    Args:
        folder: Deployment folder; its checksums are verified.
        threads: Threads inside one operator.

    Raises:
        FileFormatError: The folder is incomplete or its files have changed.
        DeploymentError: The graph cannot be loaded.
    """

    backend = "onnxruntime"

    def __init__(self, folder: str | Path, threads: int = 1) -> None:
        self.folder = Path(folder)
        self.threads = threads
        self.manifest = GraphManifest.load(folder)
        self._engine = OrtEngine(self.folder / self.manifest.engines[ENGINE].file, threads)

    def start(self, frame: np.ndarray) -> bool:
        """Nothing is computed ahead of a stream."""
        return False

    def gpu_used_mib(self) -> None:
        """It runs on no GPU."""

    def reset(self) -> None:
        """There is no memory."""

    def step(self, frame: np.ndarray) -> GraphOutput:
        """Run one image, float32 of the graph's shape.

        Raises:
            DeploymentError: Its shape or dtype is wrong, or an output is not finite.
        """
        start = time.perf_counter()
        tensors = self._engine.run({"img": frame})
        elapsed_ms = 1e3 * (time.perf_counter() - start)
        if bad := [name for name, values in tensors.items() if not np.isfinite(values).all()]:
            raise DeploymentError(f"outputs {bad} of {self.folder} are not finite; check the image and the weights")
        return GraphOutput(tensors, {ENGINE: elapsed_ms})

    def run(self, frame: np.ndarray) -> GraphOutput:
        """As `step`: there is nothing to start."""
        return self.step(frame)

    def decode(self, output: GraphOutput) -> Mapping[str, np.ndarray]:
        """Raw outputs: decoding is the host's."""
        return output.tensors

    def backend_info(self) -> dict[str, Any]:
        """What runs the graph, with its version."""
        return {"name": self.backend, **self._engine.info()}
