"""Kernels and memory of the engines of several deployments, side by side, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.trt.build import kernel_types, read_engines

MIB = 2**20
DEPTH = 4
MEMORY = {
    "plan, MiB": "plan_bytes",
    "weights, MiB": "weights_bytes",
    "activations, MiB": "activation_bytes",
    "scratch, MiB": "scratch_bytes",
}


def engine_report(folders: Sequence[str | Path], layers_of: str | None = None) -> str:
    """Compare deployments whose engines ``tools/build_engine.py`` built.

    Args:
        folders: Deployment folders; columns in this order.
        layers_of: Target whose kernels are also counted module by module; default: the first one.

    Returns:
        One table of memory and kernels per target, and one of kernels by module.

    Raises:
        DeploymentError: The deployments have no target in common.
        FileFormatError: A folder has no ``engines.json``.
    """
    targets = [read_engines(folder)["targets"] for folder in folders]
    common = [name for name in (targets[0] if targets else ()) if all(name in found for found in targets)]
    if not common:
        raise DeploymentError(f"{[str(folder) for folder in folders]} have no engines for one and the same target")
    names = [Path(folder).name for folder in folders]
    lines = []
    for target in common:
        columns = [found[target]["engines"] for found in targets]
        first = targets[0][target]
        lines += [f"## {target}, {first['library']} {first['version']}", "", *_memory_table(names, columns), ""]
    target = layers_of or common[0]
    columns = [found[target]["engines"] for found in targets]
    lines += [f"## Kernels by module, {target}", "", *_layer_table(names, columns)]
    return "\n".join(lines) + "\n"


def _memory_table(names: Sequence[str], columns: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [_row(["engine", "", *names]), _row(["---"] * 2 + ["---:"] * len(names))]
    for engine in columns[0]:
        reports = [column[engine] for column in columns]
        lines.append(_row([engine, "kernels", *(len(report["kernels"]) for report in reports)]))
        for kind in sorted({kind for report in reports for kind in kernel_types(report)}):
            lines.append(_row(["", f"of type {kind}", *(kernel_types(report)[kind] for report in reports)]))
        for title, key in MEMORY.items():
            values = ["-" if report[key] is None else f"{report[key] / MIB:.1f}" for report in reports]
            lines.append(_row(["", title, *values]))
        lines.append(_row(["", "build, s", *(f"{report['seconds']:.1f}" for report in reports)]))
    return lines


def _layer_table(names: Sequence[str], columns: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [_row(["engine", "module", *names]), _row(["---"] * 2 + ["---:"] * len(names))]
    for engine in columns[0]:
        counts = [Counter(_module(kernel) for kernel in column[engine]["kernels"]) for column in columns]
        for module in sorted({module for count in counts for module in count}):
            lines.append(_row([engine, f"`{module}`", *(count[module] for count in counts)]))
    return lines


def _module(kernel: Mapping[str, Any]) -> str:
    """Module of the first ONNX node that a kernel runs."""
    parts = kernel["onnx_layers"][0].split("/")[1:-1] if kernel["onnx_layers"] else []
    return "/".join(parts[:DEPTH]) or "(data movement)"


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
