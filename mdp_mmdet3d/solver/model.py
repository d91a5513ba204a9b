"""A mixed-binary model as plain arrays, between the formulations and SCIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mdp_mmdet3d.files import read_npz, write_npz

SCHEMA_VERSION = 1
_FIELDS = (
    "objective",
    "row_starts",
    "columns",
    "coefficients",
    "lower",
    "upper",
    "q_rows",
    "q_left",
    "q_right",
    "q_coefficients",
    "start",
)


@dataclass(frozen=True)
class MixedBinaryModel:
    """maximise ``objective @ x`` subject to ``lower <= A x + quadratic <= upper``.

    Attributes:
        binaries: The first so many variables are binary, the others continuous, >= 0.
        objective: ``(V,)``.
        row_starts: ``(R + 1,)``; row r holds ``columns[row_starts[r]:row_starts[r + 1]]``.
        columns: ``(N,)`` variable indices.
        coefficients: ``(N,)``.
        lower: ``(R,)``, -inf where open.
        upper: ``(R,)``, inf where open.
        q_rows: ``(Q,)`` row of each product ``q_coefficients * x[q_left] * x[q_right]``.
        q_left: ``(Q,)``.
        q_right: ``(Q,)``.
        q_coefficients: ``(Q,)``.
        start: ``(binaries,)`` values of a feasible solution, or empty.
    """

    binaries: int
    objective: np.ndarray
    row_starts: np.ndarray
    columns: np.ndarray
    coefficients: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    q_rows: np.ndarray
    q_left: np.ndarray
    q_right: np.ndarray
    q_coefficients: np.ndarray
    start: np.ndarray

    def without(self, binaries: np.ndarray) -> MixedBinaryModel:
        """The model without one setting of the binaries (a no-good row)."""
        signs = np.where(binaries > 0.5, 1.0, -1.0)
        return replace(
            self,
            row_starts=np.append(self.row_starts, self.row_starts[-1] + self.binaries),
            columns=np.append(self.columns, np.arange(self.binaries)),
            coefficients=np.append(self.coefficients, signs),
            lower=np.append(self.lower, -np.inf),
            upper=np.append(self.upper, float((signs > 0).sum()) - 1.0),
        )

    def save(self, path: str | Path) -> None:
        """Write as npz."""
        meta = {"schema_version": SCHEMA_VERSION, "binaries": self.binaries}
        write_npz(path, meta, {name: getattr(self, name) for name in _FIELDS})

    @classmethod
    def load(cls, path: str | Path) -> MixedBinaryModel:
        """Read what `save` wrote."""
        meta, arrays = read_npz(path, what="SCIP model", schema_version=SCHEMA_VERSION)
        return cls(binaries=int(meta["binaries"]), **{name: arrays[name] for name in _FIELDS})


class ModelBuilder:
    """Collects variables and rows; all binaries are added before the first continuous variable."""

    def __init__(self) -> None:
        self.binaries = 0
        self.size = 0
        self._objective = (np.zeros(0, np.int64), np.zeros(0))
        self._columns: list[np.ndarray] = []
        self._coefficients: list[np.ndarray] = []
        self._limits: list[tuple[float, float]] = []
        self._products: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def add_binaries(self, count: int) -> np.ndarray:
        """Indices of ``count`` new binaries."""
        if self.size != self.binaries:
            raise ValueError("binaries must come before continuous variables")
        self.binaries += count
        return self.add_continuous(count)

    def add_continuous(self, count: int) -> np.ndarray:
        """Indices of ``count`` new variables >= 0."""
        self.size += count
        return np.arange(self.size - count, self.size)

    def add_row(self, columns: np.ndarray, coefficients: np.ndarray | float, lower: float, upper: float) -> int:
        """Index of a new row ``lower <= coefficients @ x[columns] <= upper``; columns are distinct."""
        self._columns.append(columns)
        self._coefficients.append(np.broadcast_to(np.asarray(coefficients, dtype=np.float64), columns.shape))
        self._limits.append((lower, upper))
        return len(self._limits) - 1

    def add_products(self, row: int, left: np.ndarray, right: np.ndarray, coefficients: np.ndarray) -> None:
        """Add ``coefficients * x[left] * x[right]`` to a row."""
        self._products.append((np.full(left.size, row), left, right, coefficients))

    def set_objective(self, columns: np.ndarray, coefficients: np.ndarray) -> None:
        """Maximise ``coefficients @ x[columns]``."""
        self._objective = (columns, coefficients)

    def build(self, start: np.ndarray | None = None) -> MixedBinaryModel:
        """The model; ``start`` gives the binaries of a feasible solution."""
        objective = np.zeros(self.size)
        objective[self._objective[0]] = self._objective[1]
        limits = np.array(self._limits, dtype=np.float64).reshape(-1, 2)
        products = [_joined(parts) for parts in zip(*self._products)] or [np.zeros(0)] * 4
        return MixedBinaryModel(
            binaries=self.binaries,
            objective=objective,
            row_starts=np.cumsum([0, *(columns.size for columns in self._columns)]),
            columns=_joined(self._columns).astype(np.int64),
            coefficients=_joined(self._coefficients),
            lower=limits[:, 0],
            upper=limits[:, 1],
            q_rows=products[0].astype(np.int64),
            q_left=products[1].astype(np.int64),
            q_right=products[2].astype(np.int64),
            q_coefficients=products[3],
            start=np.zeros(0) if start is None else start,
        )


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0)
