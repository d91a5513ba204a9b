"""Pruning for another device: its latency table, and whole latencies that ``tools/validate_fps.py`` measured there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mdp_mmdet3d.device import Device
from mdp_mmdet3d.errors import FileFormatError, MdpError, StructureMismatchError
from mdp_mmdet3d.files import file_sha256, read_json
from mdp_mmdet3d.latency.predict import LatencyModel, MeasuredNetwork
from mdp_mmdet3d.latency.sampling import attainable_counts
from mdp_mmdet3d.latency.table import LatencyTable, NotMeasuredError
from mdp_mmdet3d.runner.networks import load_networks, save_networks
from mdp_mmdet3d.runtime.manifest import PRECISIONS_V1
from mdp_mmdet3d.runtime.validate import engine_key
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.plan import PruningPlan

FPS_VERSION = 1


def load_target_table(path: Path, space: PruningSpace, precision: str) -> LatencyTable:
    """Read a table that was made on the target and check that it can price every structure of ``space``.

    Args:
        path: Table that a probe bundle or ``tools/profile_latency.py`` wrote.
        space: What may be pruned.
        precision: In which the model will run, e.g. ``"float16"``.

    Raises:
        FileFormatError: It is no intact latency table.
        StructureMismatchError: It is of another precision.
        NotMeasuredError: It lacks operators or widths.
    """
    table = LatencyTable.load(path)
    if table.device.precision != precision:
        raise StructureMismatchError(
            f"latency table {path} was measured in {table.device.precision}, but prune.precision is {precision}: "
            f"measure again in {precision}, or prune for {table.device.precision} (--precision "
            f"{table.device.precision})"
        )
    missing: dict[str, str] = {}
    for term in space.frame_terms():
        try:
            table.lookup_many(term.signature, np.array(list(attainable_counts(space, term))))
        except NotMeasuredError as error:
            missing.setdefault(term.signature.key, str(error))
    if missing:
        operators = len({term.signature for term in space.frame_terms()})
        raise NotMeasuredError(
            f"latency table {path} ({table.device}) lacks {len(missing)} of {operators} operators of {space.model}; "
            f"the first: {next(iter(missing.values()))}. Was it made from this config? Make a bundle with "
            "tools/profile_latency.py CONFIG --bundle F.zip and measure it on the target"
        )
    return table


def table_identity(path: Path, table: LatencyTable) -> dict[str, Any]:
    """Which table a plan was made on, for plan and report."""
    return {"path": str(path), "sha256": file_sha256(path), "entries": len(table), "device": asdict(table.device)}


def target_model(space: PruningSpace, table: LatencyTable, networks: Sequence[MeasuredNetwork]) -> LatencyModel:
    """Latency model of the target: fitted to whole measurements made there, else the sum of the operators."""
    if networks:
        return LatencyModel.fit(space, table, networks)
    engines = dict.fromkeys(term.engine for term in space.frame_terms())
    return LatencyModel(
        space,
        table,
        dict.fromkeys(engines, 0.0),
        dict.fromkeys(engines, 1.0),
        ("sum of the operators, without a fit: no whole network was measured on the target",),
        doubts=tuple(filter(None, [table.doubt()])),
    )


def target_networks(
    work_dir: Path, space: PruningSpace, table: LatencyTable, added: Path | None
) -> list[MeasuredNetwork]:
    """Whole measurements of the target: those of its probe bundle, those that the work directory knows, ``added``.

    Args:
        work_dir: Keeps them in ``target_whole_latency.json``; `plan.json` says which structure was measured.
        space: What may be pruned.
        table: Of the target; measurements for another device are left out.
        added: ``fps.json`` of ``tools/validate_fps.py``, run on the target with the last plan, the dense one or both.

    Raises:
        MdpError: ``added`` belongs to neither the plan of ``work_dir`` nor the dense model, or to another precision or
            device.
    """
    path = work_dir / "target_whole_latency.json"
    identity = {"device": str(table.device), "fingerprint": space.model_digest}
    probed = _probed(table, space)
    networks = load_networks(path, identity) or []
    if added is None:
        return probed + networks
    data = read_json(added, what="FPS validation", schema_version=FPS_VERSION)
    if differences := _other_device(data, table.device):
        raise StructureMismatchError(
            f"FPS validation {added} and the latency table are not of one device ({'; '.join(differences)}): validate "
            "on the device of the table, or give that device's table"
        )
    new = _validated(data, added, table.device.precision, {term.engine for term in space.frame_terms()})
    known = [network.engines_ms for network in networks]
    if all(engines_ms in known for _, engines_ms in new):
        return probed + networks
    for plan_hash, engines_ms in new:
        plan = None if plan_hash is None else _plan_of(work_dir / "plan.json", plan_hash, added)
        widths = {} if plan is None else plan.widths(space)
        networks.append(MeasuredNetwork(widths, () if plan is None else tuple(sorted(plan.removed)), engines_ms))
    save_networks(path, identity, networks)
    return probed + networks


def _probed(table: LatencyTable, space: PruningSpace) -> list[MeasuredNetwork]:
    """Whole networks of this model that the probe bundle measured."""
    try:
        return [
            MeasuredNetwork(dict(network["widths"]), tuple(network["removed"]), dict(network["engines_ms"]))
            for network in table.networks
            if network["model_digest"] == space.model_digest
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"a whole network of the latency table is damaged ({error!r}): measure again") from error


def _validated(
    data: Mapping[str, Any], path: Path, precision: str, engines: Iterable[str]
) -> list[tuple[str | None, dict[str, float]]]:
    """Plan hash (None: dense) and milliseconds per engine of what was validated."""
    try:
        found, plan_hash = data["deployment"]["precision"], data["deployment"]["plan_hash"]
        new: list[tuple[str | None, dict[str, float]]] = [(plan_hash, _engine_times(data["latency"], engines))]
        if data["dense_latency"]:
            new.append((None, _engine_times(data["dense_latency"], engines)))
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"FPS validation {path} is damaged ({error!r}); run tools/validate_fps.py --json again"
        ) from error
    if PRECISIONS_V1.get(found, found) != precision:
        raise StructureMismatchError(
            f"FPS validation {path} is of {found}, the latency table of {precision}: export "
            "and validate in the precision of the table"
        )
    return new


def _plan_of(path: Path, plan_hash: str, validation: Path) -> PruningPlan:
    plan = PruningPlan.load(path) if path.exists() else None
    if plan is None or plan.hash != plan_hash:
        raise MdpError(
            f"FPS validation {validation} is of plan {plan_hash}, but {path} "
            f"{f'is plan {plan.hash}' if plan else 'does not exist'}: validate the plan of this work "
            "directory, or give the --work-dir it came from"
        )
    return plan


def _engine_times(latency: Mapping[str, Any], engines: Iterable[str]) -> dict[str, float]:
    times = {engine: float(latency[engine_key(engine)]) for engine in engines}
    for engine, ms in times.items():
        if not 0 < ms < float("inf"):
            raise ValueError(f"{engine_key(engine)} is {ms}, not a latency")
    return times


def _other_device(data: Mapping[str, Any], device: Device) -> list[str]:
    """In what the device of a validation is not that of a table; what the file does not tell is not compared."""
    backend, host = data.get("backend") or {}, data.get("host") or {}
    found = {
        "processor": backend.get("device") or host.get("processor"),
        "runtime": backend.get("library") or ("onnxruntime-cpu" if backend.get("name") == "onnxruntime" else None),
        "threads": backend.get("threads"),
    }
    differences = [
        f"{name}: {value!r} and {getattr(device, name)!r}"
        for name, value in found.items()
        if value is not None and value != getattr(device, name)
    ]
    # The first release wrote a processor without its family.
    same = str(device.processor).startswith(f"{found['processor']} family ")
    return [text for text in differences if not (same and text.startswith("processor"))]
