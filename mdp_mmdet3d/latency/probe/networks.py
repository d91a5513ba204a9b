"""Measures the whole networks of a bundle in turns, with the vehicle's runtime that the bundle carries."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS = 24


def measure_networks(
    folder: Path, networks: list[dict[str, Any]], backend: str, on_round: Callable[[int, int], None]
) -> dict[str, dict[str, Any]]:
    """Time every engine of every network, side by side on the same frames.

    Args:
        folder: The unpacked bundle.
        networks: Entries of the manifest's ``networks``.
        backend: ``"onnxruntime"`` or ``"tensorrt"``, whose engines are built first.
        on_round: Called with (rounds done, rounds in all).

    Returns:
        Name -> ``engines_ms`` (median of the fastest quarter) and ``runs``.

    Raises:
        RuntimeError: A network cannot be built or run.
    """
    from mdp_mmdet3d.errors import MdpError
    from mdp_mmdet3d.runtime.graph_manifest import GraphManifest, load_manifest
    from mdp_mmdet3d.runtime.load import load_runner
    from mdp_mmdet3d.runtime.measure import measure_interleaved
    from mdp_mmdet3d.runtime.synthetic import synthetic_frames, synthetic_images

    folders = {network["name"]: folder / network["folder"] for network in networks}
    for place in folders.values():
        _share(folder / "models" / "weights.bin", place / "weights.bin")
    try:
        candidates: dict[str, Any] = dict(folders)
        manifest = load_manifest(next(iter(folders.values())))
        if backend == "tensorrt":
            from mdp_mmdet3d.trt.build import build_engines

            for name, place in folders.items():
                build_engines(place, load_manifest(place))
                candidates[name] = load_runner(place, backend=backend)
        made: Any = synthetic_images if isinstance(manifest, GraphManifest) else synthetic_frames
        stats = measure_interleaved(candidates, made(manifest, 4), rounds=ROUNDS, on_round=on_round)
    except MdpError as error:
        raise RuntimeError(str(error)) from error
    return {name: {"engines_ms": dict(found.engines_ms), "runs": found.rounds} for name, found in stats.items()}


def _share(source: Path, target: Path) -> None:
    """The file of weights beside a network: ONNX Runtime reads none from outside the model's folder."""
    if target.exists():
        return
    try:
        os.link(str(source), str(target))
    except OSError:  # a file system without hard links
        shutil.copyfile(str(source), str(target))
