"""What a finished search tied its predictions to, kept so that the same job, run again, ends at the same plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mdp_mmdet3d.errors import FileFormatError
from mdp_mmdet3d.files import digest, read_json, write_json
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.latency.predict import LatencyModel, MeasuredNetwork
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.space.types import PruningSpace

SCHEMA_VERSION = 1


def search_identity(
    settings: PruneSettings,
    space: PruningSpace,
    importance: ImportanceTable,
    networks: Sequence[MeasuredNetwork],
    values: list[Any] | None,
) -> dict[str, Any]:
    """What the end of a search depends on, JSON-able.

    Args:
        settings: Budget, tolerance and refinements: more of them may meet a budget that was missed.
        space: What may be pruned.
        importance: What ranks the elements.
        networks: What the latency model was fitted to.
        values: How values in units of loss were measured; None without them.
    """
    return {
        "budget": str(settings.budget),
        "tolerance": settings.tolerance,
        "refinements": settings.refinements,
        "space": space.hash,
        "importance": [importance.weights, importance.data, importance.frames],
        **({} if values is None else {"values": values}),
        "wholes": digest([network.engines_ms for network in networks]),
    }


def save_correction(path: Path, identity: Mapping[str, Any], latency: LatencyModel, corrections: int) -> None:
    """Keep the scale and the fixed part of each engine, and how often they were corrected by a measured plan."""
    write_json(
        path,
        {
            "schema_version": SCHEMA_VERSION,
            "identity": dict(identity),
            "calibrations": corrections,
            "fixed_ms": dict(latency.fixed_ms),
            "scale": dict(latency.scale),
        },
    )


def load_correction(path: Path, identity: Mapping[str, Any], latency: LatencyModel) -> tuple[LatencyModel, int] | None:
    """The latency model as the search with this identity left it, or None if there was none.

    Raises:
        FileFormatError: The file is damaged.
    """
    if not path.exists():
        return None
    data = read_json(path, what="correction", schema_version=SCHEMA_VERSION)
    if data.get("identity") != identity:
        return None
    try:
        fixed, scale = ({engine: float(data[key][engine]) for engine in latency.scale} for key in ("fixed_ms", "scale"))
        return replace(latency, fixed_ms=fixed, scale=scale), int(data["calibrations"])
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"correction {path} is damaged ({error!r}); delete it, run again") from error
