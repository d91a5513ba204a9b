"""End-to-end latency of a structure, from the table and a few structures that were measured whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from mdp_mmdet3d.latency.sampling import EntryKey, kept_terms, term_widths
from mdp_mmdet3d.latency.table import LatencyTable, NotMeasuredError
from mdp_mmdet3d.space.types import CostTerm, PruningSpace, WidthSum

# Below this ratio of the largest to the smallest sum of operators, a slope and an offset cannot both be fitted.
ALIKE = 1.3
# A fit that is off by more than this share on its own networks says nothing; a quiet machine stays below 8 %.
DOUBTFUL = 0.2


@dataclass(frozen=True)
class MeasuredNetwork:
    """A structure that was measured whole.

    Attributes:
        widths: Kept count per dimension; missing ones are dense.
        removed: Removed blocks.
        engines_ms: Milliseconds per engine, e.g. ``{"image_encoder": 812.0, "head": 240.0}``.
    """

    widths: Mapping[str, int]
    removed: Collection[str]
    engines_ms: Mapping[str, float]


@dataclass(frozen=True)
class LatencyModel:
    """Predicts milliseconds per frame: for each engine, ``fixed + scale * sum of its terms``.

    Attributes:
        space: What may be pruned.
        table: Milliseconds of each operator.
        fixed_ms: Per engine, what is not prunable.
        scale: Per engine, how the sum of operators relates to the whole.
        explanation: How `fixed_ms` and `scale` came about, for reports.
        networks: Whole measurements that they were fitted to.
        doubts: What makes predictions untrustworthy (a fit that is far off, a table that was mostly measured while
            something else ran), each with its remedy; empty where all is well. To be shown to the user.
    """

    space: PruningSpace
    table: LatencyTable
    fixed_ms: Mapping[str, float]
    scale: Mapping[str, float]
    explanation: tuple[str, ...] = ()
    networks: tuple[MeasuredNetwork, ...] = ()
    doubts: tuple[str, ...] = ()

    @classmethod
    def from_dense(cls, space: PruningSpace, table: LatencyTable, dense_ms: Mapping[str, float]) -> LatencyModel:
        """Start from the dense model alone; `refit` with a much smaller structure as soon as there is one.

        Args:
            space: What may be pruned.
            table: Covers every term of the space.
            dense_ms: Milliseconds of each engine that runs every frame, measured whole.

        Raises:
            ValueError: An engine of the space is missing in ``dense_ms``, or a time is not positive.
        """
        return cls.fit(space, table, [MeasuredNetwork({}, (), dense_ms)])

    @classmethod
    def fit(cls, space: PruningSpace, table: LatencyTable, networks: Sequence[MeasuredNetwork]) -> LatencyModel:
        """Fit the scale and the fixed part of each engine to structures that were measured whole.

        Both are found by least squares of the relative error with the fixed part at least 0. With the dense and the
        smallest structure among the networks (`structures.fit_structures`) every prediction lies between
        measured ones. Points that are all alike cannot tell a fixed part from a scale: then the engines share one
        scale, the largest that leaves no fixed part negative, and `explanation` says so. A fit that is off by more than
        `DOUBTFUL` on one of its own networks is returned all the same, and `doubts` says so.

        Args:
            space: What may be pruned.
            table: Covers every term of the space.
            networks: Whole measurements, at least one.

        Raises:
            ValueError: There is no network, one lacks an engine or holds no positive time, or times fall while the
                operators grow.
        """
        if not networks:
            raise ValueError("a latency model needs at least the dense structure measured whole")
        engines = tuple(dict.fromkeys(term.engine for term in space.frame_terms()))
        unit = cls(space, table, dict.fromkeys(engines, 0.0), dict.fromkeys(engines, 1.0))
        for network in networks:
            for engine in engines:
                if not network.engines_ms.get(engine, 0.0) > 0:
                    raise ValueError(
                        f"a whole measurement has no positive time of {engine}: {dict(network.engines_ms)}"
                    )
        sums = [unit.predict_engines(network.widths, network.removed) for network in networks]
        x = {engine: np.array([total[engine] for total in sums]) for engine in engines}
        y = {engine: np.array([network.engines_ms[engine] for network in networks]) for engine in engines}
        shared = min(float((y[engine] / x[engine]).min()) for engine in engines)
        fixed, scale, explanation, doubts = {}, {}, [], []
        for engine in engines:
            alike = x[engine].max() < ALIKE * x[engine].min()
            if alike:
                scale[engine], fixed[engine] = shared, max(0.0, float(np.mean(y[engine] - shared * x[engine])))
            else:
                scale[engine], fixed[engine] = _fit_line(x[engine], y[engine])
            fitted = scale[engine] * x[engine] + fixed[engine]
            errors = fitted / y[engine] - 1
            worst = int(np.abs(errors).argmax())
            doubt = f"off by {abs(errors[worst]):.1%} at most"
            if alike:
                doubt = "one scale for all engines, as these networks cannot tell it from a fixed part"
            if abs(errors[worst]) > DOUBTFUL:
                doubts.append(
                    f"{engine}: the latency model is off by {errors[worst]:+.0%} on network {worst + 1} of the "
                    f"{len(networks)} that it was fitted to ({fitted[worst]:.2f} ms fitted, {y[engine][worst]:.2f} ms "
                    "measured): its predictions mean little. Measure networks and operators again while nothing else "
                    "runs there (here: delete whole_latency.json and latency_table.json of the work directory; a probe "
                    "bundle: python probe.py with another --out)"
                )
            explanation.append(
                f"{engine}: {scale[engine]:.4f} x operators + {fixed[engine]:.2f} ms, from {len(networks)} "
                f"whole measurements; {doubt}"
            )
        doubts += filter(None, [table.doubt()])
        return cls(space, table, fixed, scale, tuple(explanation), tuple(networks), tuple(doubts))

    def refit(self, networks: Sequence[MeasuredNetwork]) -> LatencyModel:
        """Fit again with further structures that were measured whole; see `fit`."""
        return self.fit(self.space, self.table, [*self.networks, *networks])

    @property
    def total_fixed_ms(self) -> float:
        """Milliseconds per frame that no plan can save."""
        return sum(self.fixed_ms.values())

    def cost_array(
        self, term: CostTerm, sums: Mapping[WidthSum, Sequence[int]] = MappingProxyType({})
    ) -> tuple[np.ndarray, np.ndarray]:
        """`LatencyTable.cost_array` with the scale of the term's engine and its runs per frame.

        With `total_fixed_ms` these add up to `predict`.
        """
        ms, interpolated = self.table.cost_array(self.space, term, sums)
        return ms * (self.scale[term.engine] * self.space.runs(term.engine)), interpolated

    def predict(self, widths: Mapping[str, int], removed: Collection[str] = ()) -> float:
        """Milliseconds per frame.

        Args:
            widths: Kept count per dimension; one that is missing keeps its dense size.
            removed: Names of removed blocks.

        Raises:
            NotMeasuredError: The table does not cover a term.
        """
        return sum(self.predict_engines(widths, removed).values())

    def predict_engines(self, widths: Mapping[str, int], removed: Collection[str] = ()) -> dict[str, float]:
        """Milliseconds per frame of each engine; arguments as for `predict`."""
        self._check(widths, removed)
        totals = dict(self.fixed_ms)
        for term, ms, _ in self._terms(widths, removed):
            totals[term.engine] += self.scale[term.engine] * ms
        return totals

    def interpolated_entries(self, widths: Mapping[str, int], removed: Collection[str] = ()) -> list[EntryKey]:
        """The distinct table entries of this structure that are not measured but interpolated."""
        self._check(widths, removed)
        return list(
            dict.fromkeys(
                (term.signature, term_widths(self.space, term, widths))
                for term, _, interpolated in self._terms(widths, removed)
                if interpolated
            )
        )

    def breakdown(
        self, widths: Mapping[str, int], removed: Collection[str] = (), *, depth: int = 2
    ) -> dict[str, float]:
        """Where the milliseconds are.

        Args:
            widths: Kept counts.
            removed: Removed blocks.
            depth: How many parts of the module path make up a row, e.g. 2 for ``"img_backbone.layer3"``.

        Returns:
            Milliseconds per module, largest first, with ``"<engine>: not prunable"`` for the fixed parts.
        """
        rows: dict[str, float] = {}
        for term, ms, _ in self._terms(widths, removed):
            module = ".".join(term.name.split(".")[:depth])
            rows[module] = rows.get(module, 0.0) + self.scale[term.engine] * ms
        for engine, fixed in self.fixed_ms.items():
            rows[f"{engine}: not prunable"] = fixed
        return dict(sorted(rows.items(), key=lambda row: -row[1]))

    def _terms(self, widths: Mapping[str, int], removed: Collection[str]) -> list[tuple[CostTerm, float, bool]]:
        result = []
        for term in kept_terms(self.space, removed):
            found = self.table.lookup(term.signature, term_widths(self.space, term, widths))
            result.append((term, found.ms * self.space.runs(term.engine), found.interpolated))
        return result

    def _check(self, widths: Mapping[str, int], removed: Collection[str]) -> None:
        unknown = [name for name in widths if name not in self.space.by_name]
        unknown += [name for name in removed if name not in self.space.blocks_by_name]
        if unknown:
            raise NotMeasuredError(
                f"{', '.join(unknown[:3])} is no dimension or block of the space of {self.space.model}"
            )


def _fit_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and offset >= 0 that minimise the squared relative error of ``slope * x + offset`` against ``y``."""
    columns = np.stack([x / y, 1 / y], axis=1)
    (slope, offset), *_ = np.linalg.lstsq(columns, np.ones(len(y)), rcond=None)
    if offset < 0:
        slope, offset = columns[:, 0].sum() / np.square(columns[:, 0]).sum(), 0.0
    if slope <= 0:
        raise ValueError(
            f"measured times {np.round(y, 2).tolist()} ms do not grow with the sums of operators "
            f"{np.round(x, 2).tolist()} ms: the machine was busy, measure the networks again"
        )
    return float(slope), float(offset)
