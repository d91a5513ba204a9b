"""JSON forms of a pruning space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mdp_mmdet3d.errors import FileFormatError
from mdp_mmdet3d.operators import OperatorSignature
from mdp_mmdet3d.space.types import (
    SCHEMA_VERSION,
    SHORTCUT,
    Block,
    BlockKind,
    CostTerm,
    Dimension,
    DimensionKind,
    NotPrunable,
    PruningSpace,
    ScoreSource,
    TensorAxis,
    Unpriced,
    Width,
    WidthSum,
    axis_to_json,
)


def _width(width: Width) -> Any:
    """JSON form; a sum is an object."""
    if isinstance(width, WidthSum):
        return {"parts": [list(part) for part in width.parts], "fixed": width.fixed}
    return width


def _width_of(data: Any) -> Width:
    """Inverse of `_width`."""
    if isinstance(data, dict):
        return WidthSum(tuple((name, times) for name, times in data["parts"]), data["fixed"])
    if not isinstance(data, (str, int)):
        raise TypeError(f"a width is a name, a number or an object, got {data!r}")
    return data


def _block(block: Block) -> dict[str, Any]:
    """JSON form; ``stays`` appears where it is not `SHORTCUT`, so that files and hashes of version 1 keep holding."""
    return {
        "name": block.name,
        "kind": block.kind.value,
        "parent": block.parent,
        **({"last": block.last} if block.last else {}),
        **({"stays": list(block.stays)} if block.stays != SHORTCUT else {}),
    }


def to_dict(space: PruningSpace) -> dict[str, Any]:
    """JSON form of a space."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": space.model,
        "fingerprint": space.model_digest,
        "dimensions": [
            {
                "name": d.name,
                "kind": d.kind.value,
                "size": d.size,
                "options": list(d.options),
                "copies": d.copies,
                "within": d.within,
                "members": [axis_to_json(m) for m in d.members],
                "sources": [
                    {"axes": [axis_to_json(a) for a in s.axes], "block": s.block, "scale": s.scale} for s in d.sources
                ],
            }
            for d in space.dimensions
        ],
        "blocks": [_block(b) for b in space.blocks],
        "terms": [
            {
                "name": t.name,
                "operator": t.signature.kind,
                "attributes": dict(t.signature.attributes),
                "widths": [_width(w) for w in t.widths],
                "block": t.block,
                "stage": t.engine,
            }
            for t in space.terms
        ],
        "not_prunable": [{"module": n.module, "reason": n.reason} for n in space.not_prunable],
        "once": list(space.once),
        **({"unpriced": [asdict(u) for u in space.unpriced]} if space.unpriced else {}),
        **({"repeated": [list(item) for item in space.repeated]} if space.repeated else {}),
    }


def from_dict(data: Mapping[str, Any], path: str | Path = "<memory>") -> PruningSpace:
    """Inverse of `to_dict`; raises `FileFormatError` naming ``path`` where a field is missing or wrong."""
    try:
        return PruningSpace(
            model=data["model"],
            model_digest=data["fingerprint"],
            dimensions=tuple(
                Dimension(
                    name=d["name"],
                    kind=DimensionKind(d["kind"]),
                    size=d["size"],
                    options=tuple(d["options"]),
                    members=tuple(TensorAxis(*m) for m in d["members"]),
                    sources=tuple(
                        ScoreSource(tuple(TensorAxis(*a) for a in s["axes"]), s["block"], s["scale"])
                        for s in d["sources"]
                    ),
                    copies=d["copies"],
                    within=d["within"],
                )
                for d in data["dimensions"]
            ),
            blocks=tuple(
                Block(b["name"], BlockKind(b["kind"]), b["parent"], b.get("last", ""), tuple(b.get("stays", SHORTCUT)))
                for b in data["blocks"]
            ),
            terms=tuple(
                CostTerm(
                    t["name"],
                    OperatorSignature.make(t["operator"], **t["attributes"]),
                    tuple(_width_of(w) for w in t["widths"]),
                    t["block"],
                    t["stage"],
                )
                for t in data["terms"]
            ),
            not_prunable=tuple(NotPrunable(n["module"], n["reason"]) for n in data["not_prunable"]),
            once=tuple(data["once"]),
            unpriced=tuple(Unpriced(**u) for u in data.get("unpriced", ())),
            repeated=tuple((engine, int(runs)) for engine, runs in data.get("repeated", ())),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"pruning space {path} is damaged ({error!r}); delete it and run again") from error
