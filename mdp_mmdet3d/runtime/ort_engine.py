"""One ONNX file executed by ONNX Runtime on the CPU, numpy in and numpy out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime.manifest import TensorSpec

MOST_THREADS = 256
_NUMPY_NAMES = {"float": "float32", "double": "float64"}


class OrtEngine:
    """A loaded graph with static shapes.

    Args:
        path: ONNX file.
        threads: Threads inside one operator. Latencies are only repeatable with 1.

    Attributes:
        inputs: Signature of the inputs by name.
        outputs: Signature of the outputs by name.

    Raises:
        DeploymentError: The file cannot be loaded or has a dynamic shape.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        if not 1 <= threads <= MOST_THREADS:
            raise DeploymentError(f"threads must be in 1..{MOST_THREADS}, got {threads}")
        self._threads = threads
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        # A trained, sharp attention is full of numbers below 1e-38, which took half of the small StreamPETR's head.
        # Only the first session of a process sets this for the calling thread.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        self.path = Path(path)
        if not self.path.is_file():
            raise DeploymentError(f"ONNX file {path} does not exist; export the model first")
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            raise DeploymentError(f"ONNX Runtime cannot load {path}: {error}") from error
        self._binding = self._session.io_binding()
        self.inputs = {value.name: self._spec(value) for value in self._session.get_inputs()}
        self.outputs = {value.name: self._spec(value) for value in self._session.get_outputs()}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Execute once.

        Args:
            feeds: Every input by name with exactly its dtype and shape; C-contiguous arrays are not copied.

        Returns:
            Every output by name, freshly allocated.

        Raises:
            DeploymentError: An input is missing, unknown, or has another dtype or shape.
        """
        if feeds.keys() != self.inputs.keys():
            missing, unknown = (
                sorted(self.inputs.keys() - feeds.keys()),
                sorted(feeds.keys() - self.inputs.keys()),
            )
            raise DeploymentError(f"{self.path}: missing inputs {missing}, unknown inputs {unknown}")
        held = []
        for name, spec in self.inputs.items():
            array = feeds[name]
            if array.dtype.name != spec.dtype or array.shape != spec.shape:
                raise DeploymentError(
                    f"{self.path}: input {name!r} is {array.dtype.name}{list(array.shape)}, "
                    f"the engine takes {spec.dtype}{list(spec.shape)}"
                )
            array = np.ascontiguousarray(array)
            held.append(array)
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        results = {}
        for name, spec in self.outputs.items():
            array = results[name] = np.empty(spec.shape, spec.dtype)
            self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        return results

    def to_host(self, value: np.ndarray) -> np.ndarray:
        """A copy of an output, for which the engine of another backend may have to fetch it."""
        return np.array(value)

    def info(self) -> dict[str, Any]:
        """Version and threads of the runtime."""
        return {"version": ort.__version__, "providers": self._session.get_providers(), "threads": self._threads}

    def _spec(self, value: ort.NodeArg) -> TensorSpec:
        if not all(isinstance(dim, int) and dim > 0 for dim in value.shape):
            raise DeploymentError(f"{self.path}: {value.name!r} has the dynamic shape {value.shape}; export statically")
        kind = value.type[len("tensor(") : -1]
        return TensorSpec(value.name, _NUMPY_NAMES.get(kind, kind), tuple(value.shape))
