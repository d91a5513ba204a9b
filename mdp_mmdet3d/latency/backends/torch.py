"""PyTorch in eager mode on the CPU or a CUDA device: for deployments that run PyTorch itself."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone

import torch
from torch import Tensor, nn

from mdp_mmdet3d.device import processor_name, system_name
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.latency.sampling import EntryKey
from mdp_mmdet3d.latency.table import Device, Entry, MeasurementProtocol
from mdp_mmdet3d.operators import OPERATORS


class TorchBackend:
    """Times operators as PyTorch calls them: CUDA events on a GPU, the wall clock on the CPU.

    Eager PyTorch fuses nothing, so operators add up without a context. On the CPU one thread is used while measuring.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        precision: ``"float32"`` or ``"float16"``.
        warmup: Runs that are thrown away.
        runs: Runs that count.

    Raises:
        MdpError: The device is not there.
    """

    def __init__(self, device: str = "cpu", precision: str = "float32", *, warmup: int = 3, runs: int = 9) -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise MdpError(f"device {device!r} cannot be used: PyTorch {torch.__version__} sees no CUDA device")
        self._device, self._precision = torch.device(device), precision
        self._dtype = getattr(torch, precision)
        self.protocol = MeasurementProtocol(
            "eager operator", warmup, runs, "median of the fastest half", staircase=False
        )

    def device(self) -> Device:
        """Describe the device and PyTorch."""
        cuda = self._device.type == "cuda"
        processor = torch.cuda.get_device_name(self._device) if cuda else processor_name()
        return Device(
            processor,
            f"torch-{self._device.type}",
            torch.__version__,
            threads=0 if cuda else 1,
            precision=self._precision,
            system=system_name(),
            python=platform.python_version(),
        )

    @torch.no_grad()
    def measure(self, keys: Iterable[EntryKey]) -> Iterator[tuple[EntryKey, Entry]]:
        """Measure the entries one after another."""
        for signature, widths in keys:
            operator, inputs = OPERATORS[signature.kind].torch_call(signature, widths)
            if isinstance(operator, nn.Module):
                operator = operator.to(self._device, self._dtype).eval()
            moved = tuple(tensor.to(self._device, self._dtype) for tensor in inputs)
            times = self._times_ms(operator, moved)
            fastest = sorted(times)[: -(-len(times) // 2)]
            spread = (max(times) - min(times)) / statistics.median(times)
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            yield (signature, widths), Entry(statistics.median(fastest), spread, len(times), now)

    def _times_ms(self, operator: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[float]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            times = [self._run_ms(operator, inputs) for _ in range(self.protocol.warmup + self.protocol.runs)]
        finally:
            torch.set_num_threads(threads)
        return times[self.protocol.warmup :]

    def _run_ms(self, operator: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            operator(*inputs)
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))
        began = time.perf_counter()
        operator(*inputs)
        return (time.perf_counter() - began) * 1000
