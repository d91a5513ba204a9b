"""What TensorRT makes of every probe, without a GPU: kernels and memory of each engine."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mdp_mmdet3d.errors import MdpError, StructureMismatchError
from mdp_mmdet3d.files import read_json, write_json
from mdp_mmdet3d.latency.backends.tensorrt import build_report
from mdp_mmdet3d.latency.graphs import Precision, operator_graph
from mdp_mmdet3d.latency.probe.tensorrt_timer import kernel_signs
from mdp_mmdet3d.latency.sampling import EntryKey
from mdp_mmdet3d.progress import PlainProgress
from mdp_mmdet3d.trt.builder import load_tensorrt

SCHEMA_VERSION = 1
_SAVE_EVERY_S = 5.0
_TARGET = re.compile(r"(?:sm)?(\d+)\.?(\d)", re.IGNORECASE)


def compute_capability(target: str) -> str:
    """``"8.6"`` of ``"sm86"`` or ``"8.6"``; raises `MdpError`."""
    match = _TARGET.fullmatch(target)
    if not match:
        raise MdpError(f"target {target!r} is no compute capability; write sm86 or 8.6")
    return f"{match[1]}.{match[2]}"


def build_probes(
    keys: Sequence[EntryKey], precision: Precision, capability: str, path: Path, console: Console
) -> dict[str, Any]:
    """Build one engine per entry and write what each became; goes on where it was stopped.

    Args:
        keys: E.g. `sampling.grid_entries` of a space.
        precision: Element type of the operators.
        capability: Compute capability, e.g. ``"8.6"``.
        path: JSON file to write.
        console: Where progress is printed.

    Returns:
        What the file holds: ``library``, ``version``, ``precision``, ``capability`` and ``probes``, a list of
        {``operator``, ``widths``, ``kernels`` (``name``, ``type``, ``onnx_layers``, ``role``: ``"target"``,
        ``"offset"``, ``"context"``, or ``"mixed"`` where TensorRT fused the operator with what only makes its inputs,
        so that its time would be too long), ``weights_bytes``, ``activation_bytes``, ``scratch_bytes``,
        ``plan_bytes``, ``seconds``}; a probe that TensorRT refuses has ``error`` instead.

    Raises:
        MdpError: There is no TensorRT.
        StructureMismatchError: ``path`` is of another TensorRT, precision or capability.
    """
    try:
        trt = load_tensorrt()
    except ImportError as error:
        raise MdpError(f"{error}: install tensorrt-rtx, which builds without a GPU") from error
    identity = {
        "schema_version": SCHEMA_VERSION,
        "library": trt.__name__,
        "version": trt.__version__,
        "precision": precision,
        "capability": capability,
    }
    result: dict[str, Any] = {**identity, "probes": []}
    if path.exists():
        result = read_json(path, what="list of built probes", schema_version=SCHEMA_VERSION)
        different = [key for key, value in identity.items() if result.get(key) != value]
        if different:
            raise StructureMismatchError(f"{path} was built with another {', '.join(different)}; give another --out")
    done = {(probe["operator"], tuple(probe["widths"])) for probe in result["probes"]}
    todo = [key for key in keys if (key[0].key, key[1]) not in done]
    progress = PlainProgress(console, f"{precision} {capability}", len(todo), "probes")
    saved = time.monotonic()
    try:
        for count, (signature, widths) in enumerate(todo, start=1):
            result["probes"].append(
                {
                    "operator": signature.key,
                    "widths": list(widths),
                    **_build(operator_graph(signature, widths, precision).model.SerializeToString(), capability),
                }
            )
            progress(count)
            if time.monotonic() - saved > _SAVE_EVERY_S:
                write_json(path, result)
                saved = time.monotonic()
    finally:
        write_json(path, result)
    return result


def refused(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The probes that TensorRT refused."""
    return [probe for probe in result["probes"] if "error" in probe]


def summary_line(result: dict[str, Any]) -> str:
    """Number of engines, kernels and seconds, for people."""
    built = [probe for probe in result["probes"] if "error" not in probe]
    kernels, mixed = (
        sum(kernel["role"] == role for probe in built for kernel in probe["kernels"]) for role in ("target", "mixed")
    )
    mib = max((probe["activation_bytes"] or 0 for probe in built), default=0) / 2**20
    return (
        f"{len(built)} of {len(result['probes'])} probes built by {result['library']} {result['version']} for "
        f"{result['capability']} in {result['precision']}: {kernels} kernels of operators, {mixed} mixed with "
        f"their context, largest activation memory {mib:.1f} MiB, "
        f"{sum(probe['seconds'] for probe in built):.0f} s of building"
    )


def _build(model: bytes, capability: str) -> dict[str, Any]:
    try:
        report = build_report(model, capability)
    except MdpError as error:
        return {"error": str(error)}
    signs = kernel_signs(report["kernels"])
    return {
        **report,
        "kernels": [{**kernel, "role": _role(kernel, signs[kernel["name"]])} for kernel in report["kernels"]],
    }


def _role(kernel: dict[str, Any], sign: int) -> str:
    if sign == 1 and any(layer.startswith("source") for layer in kernel["onnx_layers"]):
        return "mixed"
    return {1: "target", -1: "offset", 0: "context"}[sign]
