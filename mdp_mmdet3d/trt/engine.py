"""One TensorRT engine: device buffers that live as long as it does, and a CUDA graph where capture works."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.files import file_sha256
from mdp_mmdet3d.tensor_spec import TensorSpec
from mdp_mmdet3d.trt.build import import_tensorrt, read_engines
from mdp_mmdet3d.trt.builder import shared_logger
from mdp_mmdet3d.trt.cuda import DEVICE_TO_DEVICE, DEVICE_TO_HOST, HOST_TO_DEVICE, Cuda, DeviceBuffer


@dataclass(frozen=True)
class DeviceArray:
    """An output that stays on the device until the engine's next run.

    Attributes:
        address: Device pointer.
        spec: Name, dtype and shape.
    """

    address: int
    spec: TensorSpec


_cuda: Cuda | None = None


def shared_cuda() -> Cuda:
    """The process's stream: engines that hand data on must share it. Raises `DeploymentError` without a GPU."""
    global _cuda
    if _cuda is None:
        try:
            _cuda = Cuda()
        except RuntimeError as error:
            raise DeploymentError(f"TensorRT engines cannot run here: {error}") from error
    return _cuda


class TrtEngine:
    """A loaded engine with static shapes; the counterpart of `OrtEngine`.

    Args:
        folder: Deployment folder in which ``tools/build_engine.py`` was run.
        name: ``"image_encoder"``, ``"position_embedding"`` or ``"head"``.
        onnx_sha256: Checksum of the ONNX file that the engine must have been built from.
        on_device: Outputs that `run` leaves on the device.
        trt: TensorRT module; default: that of this machine.
        cuda: CUDA stream; default: the process's.

    Attributes:
        inputs: Signature of the inputs by name.
        outputs: Signature of the outputs by name.
        uses_graph: Whether runs are one launch of a CUDA graph; decided at the first run.

    Raises:
        DeploymentError: No TensorRT, GPU or engine, or it was built for another model, version or device.
        FileFormatError: ``engines.json`` is missing or malformed.
    """

    def __init__(
        self, folder: Path, name: str, onnx_sha256: str, on_device: Sequence[str] = (), *, trt: Any = None,
        cuda: Any = None,
    ) -> None:  # fmt: skip
        self._trt = trt or import_tensorrt()
        self._cuda = cuda or shared_cuda()
        self.path, entry = self._find(folder, name)
        if entry["onnx_sha256"] != onnx_sha256 or not self.path.is_file() or file_sha256(self.path) != entry["sha256"]:
            raise DeploymentError(
                f"{self.path} is missing, truncated, or was built from another {name}.onnx; run tools/build_engine.py"
            )
        runtime = self._trt.Runtime(shared_logger(self._trt))
        self._engine = runtime.deserialize_cuda_engine(self.path.read_bytes())
        if self._engine is None:
            raise DeploymentError(
                f"{self._trt.__name__} {self._trt.__version__} cannot load {self.path}: "
                "it is for another GPU or driver; run tools/build_engine.py on this machine"
            )
        self._runtime = runtime
        self._context = self._engine.create_execution_context()
        self._on_device = frozenset(on_device)
        self.inputs: dict[str, TensorSpec] = {}
        self.outputs: dict[str, TensorSpec] = {}
        self._buffers: dict[str, DeviceBuffer] = {}
        for index in range(self._engine.num_io_tensors):
            self._add_tensor(self._engine.get_tensor_name(index))
        self._graph: Any = None
        self.uses_graph: bool | None = None

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Execute once.

        Args:
            feeds: Every input by name: an array of its dtype and shape, or a `DeviceArray` with at least as many rows,
                of which the first are taken.

        Returns:
            Every output by name: arrays, and `DeviceArray` for those that stay on the device.

        Raises:
            DeploymentError: An input is missing, unknown or has another dtype or shape, or CUDA reports an error.
        """
        if feeds.keys() != self.inputs.keys():
            missing, unknown = sorted(self.inputs.keys() - feeds.keys()), sorted(feeds.keys() - self.inputs.keys())
            raise DeploymentError(f"{self.path}: missing inputs {missing}, unknown inputs {unknown}")
        held = [self._upload(spec, feeds[name]) for name, spec in self.inputs.items()]
        try:
            self._execute()
            results: dict[str, Any] = {}
            for name, spec in self.outputs.items():
                address = self._buffers[name].address
                if name in self._on_device:
                    results[name] = DeviceArray(address, spec)
                    continue
                array = results[name] = np.empty(spec.shape, spec.dtype)
                self._cuda.copy(array.ctypes.data, address, array.nbytes, DEVICE_TO_HOST)
            self._cuda.synchronize(self._cuda.stream())
        except RuntimeError as error:
            raise DeploymentError(f"{self.path}: {error}") from error
        del held  # host memory that was read until now
        return results

    def to_host(self, value: Any) -> np.ndarray:
        """A copy of an output in host memory, or of an array, which is there already."""
        if not isinstance(value, DeviceArray):
            return np.array(value)
        array = np.empty(value.spec.shape, value.spec.dtype)
        try:
            self._cuda.copy(array.ctypes.data, value.address, array.nbytes, DEVICE_TO_HOST)
            self._cuda.synchronize(self._cuda.stream())
        except RuntimeError as error:
            raise DeploymentError(f"{self.path}: {error}") from error
        return array

    def gpu_used_mib(self) -> float:
        """Memory of the GPU in use, by all processes, in MiB."""
        return self._cuda.used_bytes() / 2**20

    def info(self) -> dict[str, Any]:
        """Version and device of the runtime."""
        return {
            "library": self._trt.__name__,
            "version": self._trt.__version__,
            "device": self._cuda.device_name(),
            "cuda_graph": self.uses_graph,
        }

    def _find(self, folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
        """The engine for this library, version and GPU; one that was built on this machine comes first."""
        found = read_engines(folder)["targets"]
        own = (self._trt.__name__, self._trt.__version__)
        fitting = {key: item for key, item in found.items() if (item["library"], item["version"]) == own}
        if not fitting:
            listed = sorted({f"{item['library']} {item['version']}" for item in found.values()})
            raise DeploymentError(
                f"the engines in {folder} are for {', '.join(listed)}, this machine has {own[0]} {own[1]}; "
                "engines do not run in another version: run tools/build_engine.py on this machine"
            )
        capability = self._cuda.capability()
        for target in sorted(fitting, key=lambda key: key != "here"):
            if fitting[target]["capability"] in (None, capability):
                entry = fitting[target]["engines"][name]
                return Path(folder) / entry["file"], entry
        built = ", ".join(sorted(str(item["capability"]) for item in fitting.values()))
        raise DeploymentError(
            f"the engines in {folder} are for compute capability {built}, this GPU has {capability}; "
            "run tools/build_engine.py on this machine"
        )

    def _add_tensor(self, name: str) -> None:
        shape = tuple(self._engine.get_tensor_shape(name))
        dtype = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name))).name
        if any(extent < 0 for extent in shape):
            raise DeploymentError(f"{self.path}: {name!r} has the dynamic shape {shape}; export statically")
        spec = TensorSpec(name, dtype, shape)
        is_input = self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
        (self.inputs if is_input else self.outputs)[name] = spec
        self._buffers[name] = DeviceBuffer(self._cuda, _bytes(spec))
        self._context.set_tensor_address(name, self._buffers[name].address)

    def _upload(self, spec: TensorSpec, value: Any) -> Any:
        target = self._buffers[spec.name].address
        if isinstance(value, DeviceArray):
            # Rows are the first axis that counts, so the first rows are the first bytes.
            fits = value.spec.shape[2:] == spec.shape[2:] and _bytes(value.spec) >= _bytes(spec)
            if value.spec.dtype != spec.dtype or not fits:
                raise DeploymentError(f"{self.path}: {value.spec} does not fit input {spec}")
            self._cuda.copy(target, value.address, _bytes(spec), DEVICE_TO_DEVICE)
            return value
        if value.dtype.name != spec.dtype or value.shape != spec.shape:
            raise DeploymentError(
                f"{self.path}: input {spec.name!r} is {value.dtype.name}{list(value.shape)}, "
                f"the engine takes {spec.dtype}{list(spec.shape)}"
            )
        array = np.ascontiguousarray(value)
        self._cuda.copy(target, array.ctypes.data, array.nbytes, HOST_TO_DEVICE)
        return array

    def _execute(self) -> None:
        if self._graph is not None:
            self._cuda.launch(self._graph)
            return
        self._enqueue()
        if self.uses_graph is None:
            # The first run has made every lazy allocation, which a capture forbids.
            self._cuda.synchronize(self._cuda.stream())
            try:
                self._graph = self._cuda.capture(self._enqueue)
                self.uses_graph = True
            except RuntimeError:
                self.uses_graph = False  # reported by `info`

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream()):
            raise RuntimeError("TensorRT cannot run the engine")


def _bytes(spec: TensorSpec) -> int:
    return int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
