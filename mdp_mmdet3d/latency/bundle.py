"""The probe bundle: everything that makes a latency table on a device without torch, mmcv or this package."""

from __future__ import annotations

import json
import zipfile
from itertools import groupby
from pathlib import Path

import numpy as np
import onnx

from mdp_mmdet3d.files import atomic_path
from mdp_mmdet3d.latency.graphs import OperatorGraph, Precision, operator_graph, reference_graph
from mdp_mmdet3d.latency.sampling import EntryKey

MANIFEST_VERSION = 1
_PROGRAM = ("probe.py", "onnxruntime_timer.py", "tensorrt_timer.py")
_PACKAGE = ("__init__.py", "device.py", "trt/__init__.py", "trt/builder.py", "trt/cuda.py")  # import nothing else of it
_WEIGHTS = "weights.bin"
_INLINE_BYTES = 4096
_PAGE = 4096
_OFFSETS = 16


def write_bundle(keys: list[EntryKey], path: str | Path, precision: Precision = "float32") -> int:
    """Write a zip file that measures ``keys`` on the target: unpack it and run ``python probe.py``.

    The models share one file of random weights, so that hundreds of them take a few megabytes.

    Args:
        keys: What to measure, e.g. `sampling.grid_entries` of a space.
        path: Zip file to write.
        precision: Element type of the models.

    Returns:
        How many models the bundle holds.

    Raises:
        ValueError: There is nothing to measure.
    """
    if not keys:
        raise ValueError("a probe bundle needs at least one operator to measure")
    ordered = sorted(keys, key=lambda key: (key[0].key, key[1]))
    operators: list[dict[str, object]] = []
    largest = 0
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in _PROGRAM:
            archive.write(Path(__file__).parent / "probe" / name, name)
        for name in _PACKAGE:
            archive.write(Path(__file__).parents[1] / name, f"mdp_mmdet3d/{name}")

        def add(graph: OperatorGraph, name: str) -> dict[str, object]:
            nonlocal largest
            largest = max(largest, _share_weights(graph.model))
            archive.writestr(f"models/{name}.onnx", graph.model.SerializeToString())
            return {
                "file": f"models/{name}.onnx",
                "inputs": {k: list(v) for k, v in graph.inputs.items()},
                "copies": graph.copies,
            }

        reference = add(reference_graph(precision), "reference")
        for signature, group in groupby(ordered, key=lambda key: key[0]):
            probes = [
                {
                    "widths": list(widths),
                    **add(
                        operator_graph(signature, widths, precision),
                        f"{len(operators):03d}_{signature.kind}_{'_'.join(map(str, widths))}",
                    ),
                }
                for _, widths in group
            ]
            operators.append({"operator": signature.kind, "attributes": dict(signature.attributes), "probes": probes})
        archive.writestr(f"models/{_WEIGHTS}", _random_weights(largest + _OFFSETS * _PAGE, precision))
        archive.writestr(
            "manifest.json",
            json.dumps(
                {
                    "schema_version": MANIFEST_VERSION,
                    "precision": precision,
                    "reference": reference,
                    "operators": operators,
                },
                indent=1,
            ),
        )
    return len(keys)


def _share_weights(model: onnx.ModelProto) -> int:
    """Let large initializers refer to the shared file; returns the size in bytes of the largest."""
    largest = 0
    for index, tensor in enumerate(model.graph.initializer):
        size = len(tensor.raw_data)
        if size <= _INLINE_BYTES:
            continue
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", _WEIGHTS), ("offset", index % _OFFSETS * _PAGE), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        largest = max(largest, size)
    return largest


def _random_weights(size: int, precision: Precision) -> bytes:
    dtype = np.dtype(precision)
    values = np.random.default_rng(0).standard_normal(-(-size // dtype.itemsize), dtype=np.float32)
    return (values * np.float32(0.03)).astype(dtype).tobytes()
