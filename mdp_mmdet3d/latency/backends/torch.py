"""PyTorch in eager mode on the CPU or a CUDA device: for deployments that run PyTorch itself."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.latency.probe.host import processor_name, system_name
from mdp_mmdet3d.latency.sampling import Point
from mdp_mmdet3d.latency.table import Device, Entry, MeasurementProtocol
from mdp_mmdet3d.space import OperatorSignature

Operator = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


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

    def fingerprint(self) -> Device:
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
    def measure(self, points: Iterable[Point]) -> Iterator[tuple[Point, Entry]]:
        """Measure the points one after another."""
        for signature, widths in points:
            operator, inputs = operator_call(signature, widths)
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


def operator_call(signature: OperatorSignature, widths: tuple[int, ...]) -> Operator:
    """A callable that runs one operator and the tensors it takes, on the CPU in float32."""
    return _OPERATORS[signature.kind](signature, widths)


class _Conv(nn.Module):
    def __init__(self, signature: OperatorSignature, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            *widths,
            (signature["kernel_h"], signature["kernel_w"]),
            signature["stride"],
            signature["padding"],
            groups=signature["groups"],
        )
        self.relu = signature["relu"]

    def forward(self, x: Tensor, *residual: Tensor) -> Tensor:
        x = self.conv(x)
        if residual:
            x = x.add_(residual[0])
        return x.relu_() if self.relu else x


class _Linear(nn.Sequential):
    def __init__(self, signature: OperatorSignature, widths: tuple[int, ...]) -> None:
        layers: list[nn.Module] = [nn.Linear(*widths)]
        if signature["norm"] == "layer":
            layers.append(nn.LayerNorm(widths[1]))
        if signature["activation"] == "relu":
            layers.append(nn.ReLU())
        super().__init__(*layers)


class _Attention(nn.Module):
    def __init__(self, signature: OperatorSignature, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.heads, qk_width, v_width = widths
        size = signature["embed_dims"]
        self.shared = signature["shared"]
        self.q, self.k = (nn.Linear(size, self.heads * qk_width) for _ in range(2))
        self.v, self.out = nn.Linear(size, self.heads * v_width), nn.Linear(self.heads * v_width, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor, query_position: Tensor, key_position: Tensor, memory: Tensor) -> Tensor:
        value = torch.cat((x, memory), dim=1) if self.shared else memory
        key = value + key_position if self.shared else key_position
        parts = (self.q(x + query_position), self.k(key), self.v(value))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.norm(x + self.out((weights @ v).transpose(1, 2).flatten(2)))


class _Ffn(nn.Module):
    def __init__(self, signature: OperatorSignature, widths: tuple[int, ...]) -> None:
        super().__init__()
        size = signature["embed_dims"]
        self.up, self.down, self.norm = nn.Linear(size, widths[0]), nn.Linear(widths[0], size), nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.up(x).relu_()))


def _conv(signature: OperatorSignature, widths: tuple[int, ...]) -> Operator:
    operator = _Conv(signature, widths)
    x = torch.randn(signature["batch"], widths[0], signature["height"], signature["width"])
    with torch.no_grad():
        return operator, (x, torch.randn_like(operator.conv(x))) if signature["residual"] else (x,)


def _max_pool(signature: OperatorSignature, widths: tuple[int, ...]) -> Operator:
    x = torch.randn(signature["batch"], widths[0], signature["height"], signature["width"])
    return nn.MaxPool2d(signature["kernel"], signature["stride"], signature["padding"]), (x,)


def _upsample_add(signature: OperatorSignature, widths: tuple[int, ...]) -> Operator:
    fine = torch.randn(signature["batch"], widths[0], signature["height"], signature["width"])
    coarse = fine[..., ::2, ::2].contiguous()
    return lambda fine, coarse: fine + F.interpolate(coarse, size=fine.shape[-2:], mode="nearest"), (fine, coarse)


def _linear(signature: OperatorSignature, widths: tuple[int, ...]) -> Operator:
    return _Linear(signature, widths), (torch.randn(1, signature["tokens"], widths[0]),)


def _attention(signature: OperatorSignature, widths: tuple[int, ...]) -> Operator:
    queries, keys, size = signature["queries"], signature["keys"], signature["embed_dims"]
    rows = keys - queries if signature["shared"] else keys
    shapes = (queries, queries, keys, rows)
    return _Attention(signature, widths), tuple(torch.randn(1, n, size) for n in shapes)


def _ffn(signature: OperatorSignature, widths: tuple[int, ...]) -> Operator:
    return _Ffn(signature, widths), (torch.randn(1, signature["tokens"], signature["embed_dims"]),)


_OPERATORS: dict[str, Callable[[OperatorSignature, tuple[int, ...]], Operator]] = {
    "conv": _conv,
    "max_pool": _max_pool,
    "upsample_add": _upsample_add,
    "linear": _linear,
    "attention": _attention,
    "ffn": _ffn,
}
