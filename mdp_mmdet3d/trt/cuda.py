"""The one wrapper of the CUDA runtime library. Stand-alone: Python >= 3.8, also in probe bundles."""

from __future__ import annotations

import ctypes
import ctypes.util
from typing import Any

HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3
CAPTURE_THREAD_LOCAL = 1
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # of cudaDeviceAttr


class Cuda:
    """What timing and running need of the CUDA runtime library, on one stream; raises `RuntimeError` where it fails."""

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

    def used_bytes(self) -> int:
        """Device memory in use, by all processes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cudaFree", ctypes.c_void_p(address))

    def copy(self, target: int, source: int, size: int, kind: int) -> None:
        """Enqueue a copy of ``size`` bytes; ``kind`` is one of the constants above."""
        self._call(
            "cudaMemcpyAsync", ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size),
            ctypes.c_int(kind), ctypes.c_void_p(self.stream()),
        )  # fmt: skip

    def capability(self) -> str:
        """Compute capability of device 0, e.g. ``"8.6"``."""
        numbers = []
        for attribute in (CAPABILITY_MAJOR, CAPABILITY_MINOR):
            value = ctypes.c_int()
            self._call("cudaDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), ctypes.c_int(0))
            numbers.append(value.value)
        return f"{numbers[0]}.{numbers[1]}"

    def capture(self, enqueue: Any) -> Any:
        """Record what ``enqueue()`` puts on the stream as an executable graph; raises `RuntimeError`."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        stream = ctypes.c_void_p(self.stream())
        self._call("cudaStreamBeginCapture", stream, ctypes.c_int(CAPTURE_THREAD_LOCAL))
        try:
            enqueue()
        finally:  # a stream that stays in capture is of no use
            self._call("cudaStreamEndCapture", stream, ctypes.byref(graph))
        self._call("cudaGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        return executable

    def launch(self, executable: Any) -> None:
        """Enqueue a captured graph."""
        self._call("cudaGraphLaunch", executable, ctypes.c_void_p(self.stream()))


class DeviceBuffer:
    """Device memory that lives as long as this object."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda = cuda
        self.address = cuda.allocate(size)

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._cuda.free(self.address)
