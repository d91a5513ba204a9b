"""The pruning plan: the structure of record of a pruned model. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mdp_mmdet3d.errors import FileFormatError, StructureMismatchError
from mdp_mmdet3d.files import digest, read_json, write_json
from mdp_mmdet3d.space.types import (
    SHORTCUT,
    Block,
    BlockKind,
    DimensionKind,
    PruningSpace,
    TensorAxis,
    axis_to_json,
)

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Cut:
    """One dimension that became narrower.

    Attributes:
        kind: What the dimension counts.
        size: Dense count.
        kept: Per copy, the kept elements in their original order; every copy keeps equally many.
        members: Tensor axes that are sliced.
    """

    kind: DimensionKind
    size: int
    kept: tuple[tuple[int, ...], ...]
    members: tuple[TensorAxis, ...]

    @property
    def count(self) -> int:
        """Kept elements per copy."""
        return len(self.kept[0])


@dataclass(frozen=True)
class PruningPlan:
    """Which parts of a dense model stay. Self-contained: no pruning space is needed to apply it.

    Attributes:
        model_digest: Digest of the dense model's state-dict names and shapes.
        cuts: Narrowed dimensions by name; a dimension that is not listed stays dense.
        removed: Removed blocks by name, without their parents.
        info: Where the plan comes from (budget, predicted latency, solver status); not part of the structure.
    """

    model_digest: str
    cuts: Mapping[str, Cut]
    removed: Mapping[str, Block]
    info: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_kept(
        cls,
        space: PruningSpace,
        kept: Mapping[str, tuple[tuple[int, ...], ...]],
        removed: frozenset[str] | set[str],
        info: Mapping[str, Any] | None = None,
    ) -> PruningPlan:
        """Make a plan from kept elements per dimension.

        Args:
            space: The space that was optimised over.
            kept: Kept elements per dimension and copy; dimensions that are absent stay dense.
            removed: Names of removed blocks.
            info: Provenance for people.

        Raises:
            StructureMismatchError: A name, an element or a count does not fit the space.
        """
        unknown = [name for name in kept if name not in space.by_name]
        unknown += [name for name in removed if name not in space.blocks_by_name]
        if unknown:
            raise StructureMismatchError(f"plan names {unknown[0]!r}, which the pruning space does not have")
        blocks = {b.name: replace(b, parent=None) for b in space.blocks if b.name in removed}
        cuts = {}
        for dimension in space.dimensions:
            gone = all(any(block.contains(m.tensor) for block in blocks.values()) for m in dimension.members)
            if dimension.name not in kept or gone:
                continue
            copies = tuple(tuple(sorted(copy)) for copy in kept[dimension.name])
            counts = {len(copy) for copy in copies}
            if (
                len(copies) != dimension.copies
                or len(counts) != 1
                or not counts <= set(dimension.options)
                or any(len(set(c)) != len(c) or c[0] < 0 or c[-1] >= dimension.size for c in copies)
            ):
                raise StructureMismatchError(
                    f"kept elements of {dimension.name!r} do not fit: {len(copies)} copies (expected "
                    f"{dimension.copies}), counts {sorted(counts)} (allowed {list(dimension.options)})"
                )
            if counts != {dimension.size}:
                cuts[dimension.name] = Cut(dimension.kind, dimension.size, copies, dimension.members)
        return cls(space.model_digest, cuts, blocks, dict(info or {}))

    def width(self, name: str, dense: int) -> int:
        """Count of dimension ``name``, whose dense count is ``dense``."""
        return self.cuts[name].count if name in self.cuts else dense

    def widths(self, space: PruningSpace) -> dict[str, int]:
        """Count of every dimension of ``space``."""
        return {d.name: self.width(d.name, d.size) for d in space.dimensions}

    @property
    def structure(self) -> dict[str, Any]:
        """JSON form of what is cut, without provenance."""
        return {
            "fingerprint": self.model_digest,
            "cuts": {
                name: {
                    "kind": c.kind.value,
                    "size": c.size,
                    "count": c.count,
                    "kept": [list(k) for k in c.kept],
                    "members": [axis_to_json(m) for m in c.members],
                }
                for name, c in self.cuts.items()
            },
            "removed": {name: _removed(block) for name, block in self.removed.items()},
        }

    @cached_property
    def hash(self) -> str:
        """Digest of the structure; two plans with equal hashes give equal pruned models."""
        return digest(self.structure)

    def to_dict(self) -> dict[str, Any]:
        """JSON form with provenance."""
        return {
            "schema_version": SCHEMA_VERSION,
            "hash": self.hash,
            "info": dict(self.info),
            **self.structure,
            "last": {name: block.last for name, block in self.removed.items() if block.last},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], path: str | Path = "<memory>") -> PruningPlan:
        """Inverse of `to_dict`; raises `FileFormatError` where a field is missing or the hash does not match."""
        try:
            plan = cls(
                data["fingerprint"],
                {
                    name: Cut(
                        DimensionKind(c["kind"]),
                        c["size"],
                        tuple(tuple(k) for k in c["kept"]),
                        tuple(TensorAxis(*m) for m in c["members"]),
                    )
                    for name, c in data["cuts"].items()
                },
                {
                    name: _block(name, removed, data.get("last", {}).get(name, ""))
                    for name, removed in data["removed"].items()
                },
                data["info"],
            )
            expected = data["hash"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError(f"pruning plan {path} is damaged ({error!r}); make it again") from error
        if plan.hash != expected:
            raise FileFormatError(
                f"pruning plan {path} was changed by hand: its hash is {plan.hash}, it says {expected}"
            )
        return plan

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read what `save` wrote; raises `FileFormatError`."""
        return cls.from_dict(read_json(path, what="pruning plan", schema_version=SCHEMA_VERSION), path)


def _removed(block: Block) -> str | dict[str, Any]:
    """JSON form of a removed block: its kind alone where `SHORTCUT` stays, as in files that know nothing else."""
    usual = block.stays == SHORTCUT or block.kind is not BlockKind.RESIDUAL_BRANCH
    return block.kind.value if usual else {"kind": block.kind.value, "stays": list(block.stays)}


def _block(name: str, data: str | Mapping[str, Any], last: str) -> Block:
    """Inverse of `_removed`."""
    if isinstance(data, str):
        return Block(name, BlockKind(data), last=last)
    return Block(name, BlockKind(data["kind"]), last=last, stays=tuple(data["stays"]))
