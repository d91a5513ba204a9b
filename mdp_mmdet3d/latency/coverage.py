"""How much of a model's latency the cost terms explain, engine by engine, and what has no term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mdp_mmdet3d.latency.predict import LatencyModel

LOW = 0.9  # share below which a report warns
NAMED = 6  # operators that a line names


@dataclass(frozen=True)
class Coverage:
    """One engine of the dense model.

    Attributes:
        engine: Its name.
        dense_ms: Milliseconds of the whole engine; measured where the dense model was, else predicted.
        priced_ms: Milliseconds of its cost terms, each measured by itself.
        unpriced: Operators that a plan changes and that have no term: name, how many, why.
    """

    engine: str
    dense_ms: float
    priced_ms: float
    unpriced: tuple[tuple[str, int, str], ...] = ()

    @property
    def share(self) -> float:
        """What of the engine is priced, at most 1: operators by themselves may take longer than the engine."""
        return min(1.0, self.priced_ms / self.dense_ms) if self.dense_ms > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """An entry of ``coverage`` in ``report.json``."""
        return {
            "engine": self.engine,
            "dense_ms": self.dense_ms,
            "priced_ms": self.priced_ms,
            "share": self.share,
            "not_priced": [{"operator": name, "count": n, "reason": why} for name, n, why in self.unpriced],
        }


def coverage(model: LatencyModel) -> list[Coverage]:
    """What the terms of each engine that runs every frame come to, next to the engine itself.

    Terms count as they were measured, without the scale of the fit, which would hide what is missing.
    """
    space = model.space
    sizes = {dimension.name: dimension.size for dimension in space.dimensions}
    dense = next(
        (n for n in model.networks if not n.removed and all(sizes.get(k) == v for k, v in n.widths.items())), None
    )
    engines_ms: Mapping[str, float] = dense.engines_ms if dense else model.predict_engines({})
    found = []
    for engine in dict.fromkeys(term.engine for term in space.frame_terms()):
        terms = [term for term in space.frame_terms() if term.engine == engine]
        one_run = sum(model.table.lookup(term.signature, term.counts(sizes)).ms for term in terms)
        priced = space.runs(engine) * one_run
        unpriced = tuple((u.operator, u.count, u.reason) for u in space.unpriced if u.engine == engine)
        found.append(Coverage(engine, engines_ms[engine], priced, unpriced))
    return found


def coverage_line(entry: Mapping[str, Any]) -> str:
    """An entry of ``coverage`` in ``report.json`` as a sentence."""
    line = f"{entry['share']:.0%} of {entry['engine']}'s {entry['dense_ms']:.1f} ms is priced"
    names = merged(entry["not_priced"])
    if names:
        shown = [f"{name} x {count}" for name, count in list(names.items())[:NAMED]]
        line += f"; not priced: {', '.join(shown)}{', ...' if len(names) > NAMED else ''}"
    else:
        line += "; every operator that a plan changes has a term"
    return line


def is_low(entry: Mapping[str, Any]) -> bool:
    """Whether plans for this entry of ``coverage`` miss much: the share is below `LOW`, and operators lack a term."""
    return bool(entry["not_priced"]) and entry["share"] < LOW


def merged(operators: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Operators and how many of each, whatever the reason, the most frequent first."""
    counts: dict[str, int] = {}
    for operator in operators:
        counts[operator["operator"]] = counts.get(operator["operator"], 0) + operator["count"]
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
