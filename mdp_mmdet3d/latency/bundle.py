"""The probe bundle: everything that makes a latency table on a device without torch, mmcv or this package."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from mdp_mmdet3d.files import atomic_path, digest
from mdp_mmdet3d.latency.graphs import OperatorGraph, Precision, operator_graph, reference_graph
from mdp_mmdet3d.latency.sampling import EntryKey
from mdp_mmdet3d.runtime.manifest import DIGEST, MANIFEST_FILE
from mdp_mmdet3d.runtime.pyz import BASE, FOLDERS

MANIFEST_VERSION = 1
_PROGRAM = ("probe.py", "networks.py", "onnxruntime_timer.py", "tensorrt_timer.py")
_PACKAGE = Path(__file__).parents[1]
_WEIGHTS = "weights.bin"
_INLINE_BYTES = 4096
_PAGE = 4096
_OFFSETS = 16


@dataclass(frozen=True)
class BundleNetwork:
    """A whole network to measure on the target.

    Attributes:
        folder: Deployment folder in the bundle's precision.
        model_digest: Of the space.
        widths: Kept count per dimension.
        removed: Removed blocks.
    """

    folder: Path
    model_digest: str
    widths: Mapping[str, int]
    removed: Sequence[str]


def write_bundle(
    keys: list[EntryKey],
    path: str | Path,
    precision: Precision = "float32",
    networks: Sequence[BundleNetwork] = (),
) -> int:
    """Write a zip file that measures ``keys`` on the target: unpack it and run ``python probe.py``.

    The models share one file of random weights, so that hundreds of them take a few megabytes.

    Args:
        keys: What to measure, e.g. `sampling.grid_entries` of a space.
        path: Zip file to write.
        precision: Element type of the models.
        networks: Whole networks to measure after the operators; the latency model is fitted to them. Their large
            weights come from the shared file too: what they compute does not matter.

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
        for file in _package_files():
            archive.write(file, f"mdp_mmdet3d/{file.relative_to(_PACKAGE).as_posix()}")

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
        wholes = []
        for network in networks:
            largest = max(largest, _add_network(archive, network))
            wholes.append(
                {
                    "name": network.folder.name,
                    "folder": f"networks/{network.folder.name}",
                    "model_digest": network.model_digest,
                    "widths": dict(network.widths),
                    "removed": list(network.removed),
                }
            )
        archive.writestr(f"models/{_WEIGHTS}", _random_weights(largest + _OFFSETS * _PAGE, precision))
        archive.writestr(
            "manifest.json",
            json.dumps(
                {
                    "schema_version": MANIFEST_VERSION,
                    "precision": precision,
                    "reference": reference,
                    "operators": operators,
                    "networks": wholes,
                },
                indent=1,
            ),
        )
    return len(keys)


def _package_files() -> list[Path]:
    """What the probe imports of this package."""
    files = [_PACKAGE / f"{name}.py" for name in BASE]
    return files + sorted(path for folder in FOLDERS for path in (_PACKAGE / folder).rglob("*.py"))


def _add_network(archive: zipfile.ZipFile, network: BundleNetwork) -> int:
    """A deployment without its large weights; returns the size in bytes of the largest."""
    place, largest = f"networks/{network.folder.name}", 0
    manifest = json.loads((network.folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    manifest.pop(DIGEST, None)
    manifest["checks"] = {}
    for name in manifest["checksums"]:
        content = (network.folder / name).read_bytes()
        if name.endswith(".onnx"):
            model = onnx.load_from_string(content)
            largest = max(largest, _share_weights(model, _layer_weights(model)))
            content = model.SerializeToString()
        archive.writestr(f"{place}/{name}", content)
        manifest["checksums"][name] = hashlib.sha256(content).hexdigest()
    archive.writestr(f"{place}/{MANIFEST_FILE}", json.dumps({**manifest, DIGEST: digest(manifest)}, indent=1))
    return largest


def _layer_weights(model: onnx.ModelProto) -> set[str]:
    """Weights of layers: any values will do, unlike those of indices, shapes and points."""
    return {
        node.input[1] for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul") and len(node.input) > 1
    }


def _share_weights(model: onnx.ModelProto, names: set[str] | None = None) -> int:
    """Let large initializers, or those of ``names``, refer to the shared file; the size in bytes of the largest."""
    largest = 0
    for index, tensor in enumerate(model.graph.initializer):
        if names is not None and tensor.name not in names:
            continue
        if not tensor.raw_data:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
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
