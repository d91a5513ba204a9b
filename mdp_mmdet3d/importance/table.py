"""What every element is worth: plain data, numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mdp_mmdet3d.errors import FileFormatError, StructureMismatchError
from mdp_mmdet3d.files import read_npz, write_npz
from mdp_mmdet3d.space.types import PruningSpace

SCHEMA_VERSION = 1

Scores = Mapping[str, Mapping[str | None, np.ndarray]]


@dataclass(frozen=True)
class ImportanceTable:
    """First-order Taylor importance, averaged over batches.

    Attributes:
        model_digest: Digest of the dense model's state-dict names and shapes.
        weights: Identity of the weights: ``"random"`` or name and digest of a checkpoint.
        batches: Batches that were accumulated.
        skipped: Batches with a loss or gradient that was not finite.
        frames: Batches that were asked for; a data set that ends early gives fewer.
        scores: Per dimension and block (None: outside every block), an array (copies, size).
        data: Where the batches came from.
    """

    model_digest: str
    weights: str
    batches: int
    skipped: int
    frames: int
    scores: Scores
    data: str = ""

    def total(self, dimension: str, kept_blocks: frozenset[str] | None = None) -> np.ndarray:
        """Summed score of every element, (copies, size).

        Args:
            dimension: Name.
            kept_blocks: Count only what lies in these blocks or outside of every block; all by default.
        """
        parts = [
            array
            for block, array in self.scores[dimension].items()
            if block is None or kept_blocks is None or block in kept_blocks
        ]
        first = next(iter(self.scores[dimension].values()))
        return np.sum(parts, axis=0) if parts else np.zeros_like(first)

    def save(self, path: str | Path) -> None:
        """Write as npz, atomically."""
        index = [(name, block) for name, blocks in self.scores.items() for block in blocks]
        meta = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.model_digest,
            "weights": self.weights,
            "data": self.data,
            "batches": self.batches,
            "skipped": self.skipped,
            "requested": self.frames,
            "index": index,
        }
        arrays = {f"score_{i}": self.scores[name][block] for i, (name, block) in enumerate(index)}
        write_npz(path, meta, arrays)

    @classmethod
    def load(cls, path: str | Path, space: PruningSpace | None = None) -> ImportanceTable:
        """Read what `save` wrote.

        Args:
            path: File.
            space: If given, the table must belong to it.

        Raises:
            FileFormatError: The file is damaged.
            StructureMismatchError: It belongs to another model or other dimensions.
        """
        meta, arrays = read_npz(path, what="importance table", schema_version=SCHEMA_VERSION)
        try:
            scores: dict[str, dict[str | None, np.ndarray]] = {}
            for i, (name, block) in enumerate(meta["index"]):
                scores.setdefault(name, {})[block] = arrays[f"score_{i}"]
            table = cls(
                meta["fingerprint"],
                meta["weights"],
                meta["batches"],
                meta["skipped"],
                meta["requested"],
                scores,
                meta["data"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"importance table {path} is damaged ({error!r}); delete it and run again") from error
        if space is not None:
            table.check(space, path)
        return table

    def check(self, space: PruningSpace, path: str | Path = "<memory>") -> None:
        """Raise `StructureMismatchError` unless the table was collected for ``space``."""
        if self.model_digest != space.model_digest:
            raise StructureMismatchError(
                f"importance {path} was collected for another model (digest {self.model_digest}, this model has "
                f"{space.model_digest}); delete it or give another --work-dir"
            )
        for dimension in space.dimensions:
            blocks = {source.block for source in dimension.sources}
            found = self.scores.get(dimension.name, {})
            if set(found) != blocks or any(a.shape != (dimension.copies, dimension.size) for a in found.values()):
                raise StructureMismatchError(
                    f"importance {path} has no matching scores for {dimension.name!r}; the pruning space has changed: "
                    "delete it and run again"
                )
            if any(not np.isfinite(a).all() or (a < 0).any() for a in found.values()):
                raise FileFormatError(f"importance {path} holds negative or non-finite scores for {dimension.name!r}")
