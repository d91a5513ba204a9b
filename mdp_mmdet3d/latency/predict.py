"""End-to-end latency of a structure, from the table and one measurement of the whole dense model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mdp_mmdet3d.latency.sampling import kept_terms, term_widths
from mdp_mmdet3d.latency.table import LatencyTable, NotMeasuredError
from mdp_mmdet3d.space import CostTerm, PruningSpace


@dataclass(frozen=True)
class Measured:
    """A structure that was measured whole.

    Attributes:
        widths: Kept count per dimension; missing ones are dense.
        removed: Removed blocks.
        stages_ms: Milliseconds per engine, e.g. ``{"image_encoder": 812.0, "head": 240.0}``.
    """

    widths: Mapping[str, int]
    removed: frozenset[str]
    stages_ms: Mapping[str, float]


@dataclass(frozen=True)
class LatencyModel:
    """Predicts milliseconds per frame: for each engine, ``scale * (fixed + sum of its terms)``.

    Attributes:
        space: What may be pruned.
        table: Milliseconds of each operator.
        fixed_ms: Per engine, what is not prunable.
        scale: Per engine, how the sum of operators relates to the whole.
        explanation: How `fixed_ms` and `scale` came about, for reports.
    """

    space: PruningSpace
    table: LatencyTable
    fixed_ms: Mapping[str, float]
    scale: Mapping[str, float]
    explanation: tuple[str, ...] = field(default=())

    @classmethod
    def from_dense(
        cls, space: PruningSpace, table: LatencyTable, dense_ms: Mapping[str, float]
    ) -> LatencyModel:
        """Take the fixed part as what the dense model needs beyond its terms.

        Where the terms alone exceed the whole (an operator may be a little slower in its own small model), the
        fixed part is 0 and the scale falls below 1 instead; `explanation` says so.

        Args:
            space: What may be pruned.
            table: Covers every term of the space.
            dense_ms: Milliseconds of each engine that runs every frame, measured whole.

        Raises:
            ValueError: An engine of the space is missing in ``dense_ms``, or a time is not positive.
        """
        stages = dict.fromkeys(term.stage for term in space.frame_terms())
        if missing := [stage for stage in stages if stage not in dense_ms]:
            raise ValueError(
                f"the dense latency of {', '.join(missing)} is missing; measured were "
                f"{', '.join(dense_ms) or 'none'}"
            )
        raw = cls(space, table, dict.fromkeys(dense_ms, 0.0), dict.fromkeys(dense_ms, 1.0)).predict_stages(
            {}, ()
        )
        fixed, scale, explanation = {}, {}, []
        for stage, whole in dense_ms.items():
            if not (np.isfinite(whole) and whole > 0):
                raise ValueError(f"dense latency of {stage} is {whole!r} ms, not a positive time")
            fixed[stage] = max(whole - raw[stage], 0.0)
            scale[stage] = min(whole / raw[stage], 1.0) if raw[stage] > 0 else 1.0
            if scale[stage] < 1:
                explanation.append(
                    f"{stage}: the dense terms sum to {raw[stage]:.2f} ms, the whole takes {whole:.2f} "
                    f"ms; fixed part 0, scale {scale[stage]:.4f}"
                )
            else:
                explanation.append(f"{stage}: {fixed[stage]:.2f} of {whole:.2f} ms are not prunable")
        return cls(space, table, fixed, scale, tuple(explanation))

    @property
    def total_fixed_ms(self) -> float:
        """Milliseconds per frame that no plan can save."""
        return sum(self.scale[stage] * fixed for stage, fixed in self.fixed_ms.items())

    def cost_array(self, term: CostTerm) -> tuple[np.ndarray, np.ndarray]:
        """`LatencyTable.cost_array` with the scale of the term's engine.

        With `total_fixed_ms` these add up to `predict`.
        """
        ms, interpolated = self.table.cost_array(self.space, term)
        return ms * self.scale[term.stage], interpolated

    def predict(self, widths: Mapping[str, int], removed: Collection[str] = ()) -> float:
        """Milliseconds per frame.

        Args:
            widths: Kept count per dimension; one that is missing keeps its dense size.
            removed: Names of removed blocks.

        Raises:
            NotMeasuredError: The table does not cover a term.
        """
        return sum(self.predict_stages(widths, removed).values())

    def predict_stages(self, widths: Mapping[str, int], removed: Collection[str] = ()) -> dict[str, float]:
        """Milliseconds per frame of each engine; arguments as for `predict`."""
        self._check(widths, removed)
        totals = dict(self.fixed_ms)
        for term, ms, _ in self._terms(widths, removed):
            totals[term.stage] = totals[term.stage] + ms
        return {stage: self.scale[stage] * total for stage, total in totals.items()}

    def interpolated_entries(self, widths: Mapping[str, int], removed: Collection[str] = ()) -> int:
        """How many distinct table entries of this structure are not measured but interpolated."""
        self._check(widths, removed)
        return len(
            {
                (term.signature, term_widths(self.space, term, widths))
                for term, _, interpolated in self._terms(widths, removed)
                if interpolated
            }
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
            Milliseconds per module, largest first, with ``"<stage>: not prunable"`` for the fixed parts.
        """
        rows: dict[str, float] = {}
        for term, ms, _ in self._terms(widths, removed):
            module = ".".join(term.name.split(".")[:depth])
            rows[module] = rows.get(module, 0.0) + self.scale[term.stage] * ms
        for stage, fixed in self.fixed_ms.items():
            rows[f"{stage}: not prunable"] = self.scale[stage] * fixed
        return dict(sorted(rows.items(), key=lambda row: -row[1]))

    def calibrate(self, points: Sequence[Measured]) -> LatencyModel:
        """Fit one scale per engine to structures that were measured whole, the dense one among them.

        The scale minimises the squared relative error; no offset is fitted, because offsets fail outside the
        range that they were fitted on.

        Raises:
            ValueError: No point, or a point lacks an engine.
        """
        if not points:
            raise ValueError("calibration needs at least one measured structure")
        scale = {}
        for stage in self.fixed_ms:
            ratios = []
            for point in points:
                if stage not in point.stages_ms:
                    raise ValueError(f"a calibration point has no measurement of {stage}")
                unscaled = self.predict_stages(point.widths, point.removed)[stage] / self.scale[stage]
                if unscaled > 0:
                    ratios.append(unscaled / point.stages_ms[stage])
            scale[stage] = float(np.sum(ratios) / np.sum(np.square(ratios))) if ratios else self.scale[stage]
        note = "; ".join(f"{stage} {value:.4f}" for stage, value in scale.items())
        return replace(
            self,
            scale=scale,
            explanation=(*self.explanation, f"scale fitted to {len(points)} whole networks: {note}"),
        )

    def _terms(
        self, widths: Mapping[str, int], removed: Collection[str]
    ) -> list[tuple[CostTerm, float, bool]]:
        result = []
        for term in kept_terms(self.space, removed):
            found = self.table.lookup(term.signature, term_widths(self.space, term, widths))
            result.append((term, found.ms, found.interpolated))
        return result

    def _check(self, widths: Mapping[str, int], removed: Collection[str]) -> None:
        unknown = [name for name in widths if name not in self.space.by_name]
        unknown += [name for name in removed if name not in self.space.blocks_by_name]
        if unknown:
            raise NotMeasuredError(
                f"{', '.join(unknown[:3])} is no dimension or block of the space of {self.space.model}"
            )
