"""Whole networks, exported and measured side by side: what the latency model is fitted to."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mdp_mmdet3d.adapters import Adapter
from mdp_mmdet3d.errors import FileFormatError
from mdp_mmdet3d.files import read_json, write_json
from mdp_mmdet3d.latency.bundle import BundleNetwork
from mdp_mmdet3d.latency.predict import MeasuredNetwork
from mdp_mmdet3d.latency.structures import Structure, fit_structures
from mdp_mmdet3d.onnx.reduce import halve
from mdp_mmdet3d.runtime.measure import LatencyStats
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.plan import PruningPlan

SCHEMA_VERSION = 1


def plan_of_structure(space: PruningSpace, structure: Structure) -> PruningPlan:
    """A plan with these widths; which elements stay does not matter for latency."""
    kept = {d.name: (tuple(range(structure.widths[d.name])),) * d.copies for d in space.dimensions}
    return PruningPlan.from_kept(space, kept, structure.removed)


def load_networks(path: Path, identity: Mapping[str, Any]) -> list[MeasuredNetwork] | None:
    """Measurements of an earlier run, or None if there are none of this device, model and input size."""
    if not path.exists():
        return None
    data = read_json(path, what="whole-network latency", schema_version=SCHEMA_VERSION)
    if data.get("identity") != identity:
        return None
    try:
        return [MeasuredNetwork(p["widths"], tuple(p["removed"]), p["stages_ms"]) for p in data["points"]]
    except (KeyError, TypeError) as error:
        raise FileFormatError(f"whole-network latency {path} is damaged ({error!r}); delete it, run again") from error


def save_networks(path: Path, identity: Mapping[str, Any], networks: Sequence[MeasuredNetwork]) -> None:
    """Keep measurements for `load_networks`."""
    write_json(
        path,
        {
            "schema_version": SCHEMA_VERSION,
            "identity": dict(identity),
            "points": [
                {"widths": dict(n.widths), "removed": list(n.removed), "stages_ms": dict(n.engines_ms)}
                for n in networks
            ],
        },
    )


def bundle_networks(
    adapter: Adapter, space: PruningSpace, dense: nn.Module, folder: Path, precision: str, count: int
) -> list[BundleNetwork]:
    """Export the structures of `measure_networks` for a probe bundle.

    Args:
        adapter: Of the model.
        space: What may be pruned.
        dense: Dense model; not changed.
        folder: Where the deployments go.
        precision: ``"float32"`` or ``"float16"``.
        count: Structures in all, at least 2.
    """
    networks = []
    for index, structure in enumerate(fit_structures(space, count)):
        plan = plan_of_structure(space, structure)
        place = folder / ("dense" if index == 0 else f"network_{index}")
        adapter.export(apply_plan(copy.deepcopy(dense), plan), place, plan_hash=plan.hash, weights="random")
        if precision == "float16":
            halve(place)
        networks.append(BundleNetwork(place, space.model_digest, structure.widths, sorted(structure.removed)))
    return networks


def measure_networks(
    path: Path,
    identity: Mapping[str, Any],
    space: PruningSpace,
    dense: nn.Module,
    folder: Path,
    export: Callable[[nn.Module, str, PruningPlan], None],
    measure: Callable[[Sequence[str]], dict[str, LatencyStats]],
    *,
    count: int,
) -> list[MeasuredNetwork]:
    """Measure the dense, the smallest and some random structures in turns.

    Args:
        path: Where the result is kept.
        identity: Device, model and input size; a result with another identity is not reused.
        space: What may be pruned.
        dense: Dense model; not changed.
        folder: Where exported models lie; the dense one is there already as ``dense``.
        export: Writes a model under a name into ``folder``.
        measure: Measures the named models of ``folder`` side by side.
        count: Structures in all, at least 2.

    Returns:
        The dense one first.
    """
    structures = fit_structures(space, count)
    names = ["dense", *(f"network_{i}" for i in range(1, count))]
    try:
        for name, structure in zip(names[1:], structures[1:]):
            plan = plan_of_structure(space, structure)
            export(apply_plan(copy.deepcopy(dense), plan), name, plan)
        stats = measure(names)
    finally:
        for name in names[1:]:
            shutil.rmtree(folder / name, ignore_errors=True)
    networks = [
        MeasuredNetwork(dict(s.widths), tuple(sorted(s.removed)), dict(stats[name].engines_ms))
        for name, s in zip(names, structures)
    ]
    save_networks(path, identity, networks)
    return networks
