"""The pruning program as plain arrays: what may be chosen, what each choice is worth and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mdp_mmdet3d.errors import FileFormatError
from mdp_mmdet3d.files import read_npz, write_npz
from mdp_mmdet3d.solver.problem_checks import (
    InvalidProblemError,
    block_chains,
    check_names,
    check_options,
    checked_array,
    checked_mask,
    without_forbidden,
)

SCHEMA_VERSION = 2
_READABLE = (1, 2)
_LOCAL_DIMENSIONS = 3


@dataclass(frozen=True)
class ProblemDimension:
    """A count to choose.

    Attributes:
        name: Unique.
        options: Allowed counts, increasing; the last one is dense. The first may be 0.
    """

    name: str
    options: tuple[int, ...]


@dataclass(frozen=True)
class ProblemBlock:
    """A removable unit.

    Attributes:
        name: Unique.
        parent: Index of the block that contains it, or None.
    """

    name: str
    parent: int | None = None


@dataclass(frozen=True)
class ProblemTerm:
    """A part of value and cost that depends on at most three dimensions, global ones not counted.

    Attributes:
        name: For messages; need not be unique.
        dimensions: Indices of distinct dimensions: the axes of the arrays.
        block: Index of the innermost block it lives in, or None. It counts only while that block and its
            parents are kept.
        costs: Per metric, an array of the dimensions' option counts (0-d without dimensions), >= 0.
        value: What is kept, same shape; None is zero. Negative where keeping it is worse than nothing.
        allowed: Which combinations a plan may use while the term counts, boolean, same shape; None is all. What the
            other arrays hold for the rest is ignored and becomes 0.
        when_removed: It counts while its block is removed and the block's parent is kept, instead.
    """

    name: str
    dimensions: tuple[int, ...]
    block: int | None
    costs: Mapping[str, np.ndarray]
    value: np.ndarray | None = None
    allowed: np.ndarray | None = None
    when_removed: bool = False


@dataclass(frozen=True)
class ProblemStructure:
    """One structure, by index.

    Attributes:
        options: Per dimension, the index of the chosen option.
        kept: Per block, whether it stays.
    """

    options: tuple[int, ...]
    kept: tuple[bool, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain lists; `from_json` reads them back."""
        return {"options": list(self.options), "kept": list(self.kept)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProblemStructure:
        """Inverse of `to_json`."""
        return cls(tuple(int(k) for k in data["options"]), tuple(bool(k) for k in data["kept"]))


@dataclass(frozen=True)
class Evaluation:
    """What a plan costs, per metric in the metric's unit, and what it is worth."""

    costs: dict[str, float]
    value: float


@dataclass(frozen=True)
class PruningProblem:
    """Choose one option per dimension and which blocks stay (docs/method.md, section 5.1).

    A plan's value and costs are the sums over the terms whose blocks are all kept.

    Attributes:
        name: For messages.
        metrics: Names of the costs, e.g. ``("latency_ms",)``; the first one breaks ties.
        dimensions: Counts to choose.
        blocks: Removable units.
        terms: Parts of value and cost.
        global_dimensions: Indices of dimensions that many terms depend on, such as an embedding width. `solve` solves
            one smaller problem for every combination of their options; a term may use any number of them besides its
            three others.

    Raises:
        InvalidProblemError: An array has the wrong shape or holds NaN or infinity, a cost is negative, an
            index is out of range, options do not increase, a name is used twice, parents form a cycle.
    """

    name: str
    metrics: tuple[str, ...]
    dimensions: tuple[ProblemDimension, ...]
    blocks: tuple[ProblemBlock, ...]
    terms: tuple[ProblemTerm, ...]
    global_dimensions: tuple[int, ...] = ()
    chains: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_names("metric", self.metrics)
        check_names("dimension", tuple(d.name for d in self.dimensions))
        check_names("block", tuple(b.name for b in self.blocks))
        for dimension in self.dimensions:
            check_options(dimension)
        object.__setattr__(
            self,
            "dimensions",
            tuple(ProblemDimension(d.name, tuple(int(count) for count in d.options)) for d in self.dimensions),
        )
        object.__setattr__(self, "chains", block_chains(self.blocks))
        object.__setattr__(self, "global_dimensions", tuple(sorted(int(d) for d in self.global_dimensions)))
        if len(set(self.global_dimensions)) != len(self.global_dimensions):
            raise InvalidProblemError(f"global dimensions {self.global_dimensions} are not distinct")
        for index in self.global_dimensions:
            if not 0 <= index < len(self.dimensions):
                raise InvalidProblemError(f"global dimension {index} is none of the {len(self.dimensions)} dimensions")
        object.__setattr__(self, "terms", tuple(self._checked(term) for term in self.terms))

    def _checked(self, term: ProblemTerm) -> ProblemTerm:
        where = f"term {term.name!r}"
        local = set(term.dimensions) - set(self.global_dimensions)
        if len(set(term.dimensions)) != len(term.dimensions) or len(local) > _LOCAL_DIMENSIONS:
            raise InvalidProblemError(
                f"{where} needs up to three distinct dimensions that are not global, got {term.dimensions}"
            )
        for index in term.dimensions:
            if not 0 <= index < len(self.dimensions):
                raise InvalidProblemError(f"{where} names dimension {index} of {len(self.dimensions)}")
        if term.block is not None and not 0 <= term.block < len(self.blocks):
            raise InvalidProblemError(f"{where} names block {term.block} of {len(self.blocks)}")
        if term.when_removed and term.block is None:
            raise InvalidProblemError(f"{where} counts when its block is removed, but has no block")
        if set(term.costs) != set(self.metrics):
            raise InvalidProblemError(
                f"{where} has costs for {sorted(term.costs)}, the problem for {sorted(self.metrics)}"
            )
        shape = tuple(len(self.dimensions[index].options) for index in term.dimensions)
        allowed = None if term.allowed is None else checked_mask(term.allowed, shape, f"{where}: allowed")
        if allowed is not None:
            term = without_forbidden(term, allowed, shape)
            allowed = term.allowed
        costs = {
            metric: checked_array(term.costs[metric], shape, f"{where}: cost {metric!r}") for metric in self.metrics
        }
        value = None if term.value is None else checked_array(term.value, shape, f"{where}: value", signed=True)
        dimensions = tuple(int(index) for index in term.dimensions)
        block = None if term.block is None else int(term.block)
        return ProblemTerm(term.name, dimensions, block, costs, value, allowed, bool(term.when_removed))

    @property
    def dense_plan(self) -> ProblemStructure:
        """Every dimension at its last option, every block kept."""
        return ProblemStructure(tuple(len(d.options) - 1 for d in self.dimensions), (True,) * len(self.blocks))

    @cached_property
    def least_value(self) -> float:
        """No plan is worth less: the sum of what is negative in the terms, 0 as a rule. Gaps are relative to it."""
        return sum(min(0.0, float(term.value.min())) for term in self.terms if term.value is not None)

    @cached_property
    def most_value(self) -> float:
        """No plan is worth more: the sum of the largest value of every term."""
        return sum(max(0.0, float(term.value.max())) for term in self.terms if term.value is not None)

    @cached_property
    def dense(self) -> Evaluation:
        """Costs and value of the dense plan; raises `InvalidProblemError` where a mask forbids it."""
        return self.evaluate(self.dense_plan)

    def evaluate(self, plan: ProblemStructure) -> Evaluation:
        """Value and costs of a plan from the original tables.

        Raises:
            InvalidProblemError: The plan has other dimensions or blocks, an option that does not exist, keeps a
                block whose parent is removed, or uses a combination that a term does not allow.
        """
        self.check_plan(plan)
        costs = dict.fromkeys(self.metrics, 0.0)
        value = 0.0
        for term in self.terms:
            if self.counts_in(term, plan.kept):
                index = tuple(plan.options[d] for d in term.dimensions)
                for metric in self.metrics:
                    costs[metric] += float(term.costs[metric][index])
                if term.value is not None:
                    value += float(term.value[index])
        return Evaluation(costs, value)

    def check_plan(self, plan: ProblemStructure) -> None:
        """Raise `InvalidProblemError` unless the plan is a structure of this problem."""
        if len(plan.options) != len(self.dimensions) or len(plan.kept) != len(self.blocks):
            raise InvalidProblemError(
                f"plan has {len(plan.options)} dimensions and {len(plan.kept)} blocks, "
                f"problem {self.name!r} has {len(self.dimensions)} and {len(self.blocks)}"
            )
        for dimension, option in zip(self.dimensions, plan.options):
            if not 0 <= option < len(dimension.options):
                raise InvalidProblemError(f"dimension {dimension.name!r} has no option {option}")
        for block, kept in zip(self.blocks, plan.kept):
            if kept and block.parent is not None and not plan.kept[block.parent]:
                parent = self.blocks[block.parent].name
                raise InvalidProblemError(f"block {block.name!r} is kept, its parent {parent!r} is removed")
        for term in self.terms:
            if not self._allows(term, plan):
                counts = ", ".join(
                    f"{self.dimensions[d].name} = {self.dimensions[d].options[plan.options[d]]}"
                    for d in term.dimensions
                )
                raise InvalidProblemError(f"term {term.name!r} does not allow {counts or 'its block'}")

    def allows(self, plan: ProblemStructure) -> bool:
        """Whether the terms allow the plan's combinations; the plan must have the right sizes."""
        return all(self._allows(term, plan) for term in self.terms)

    def _allows(self, term: ProblemTerm, plan: ProblemStructure) -> bool:
        if term.allowed is None or not self.counts_in(term, plan.kept):
            return True
        return bool(term.allowed[tuple(plan.options[d] for d in term.dimensions)])

    def counts_in(self, term: ProblemTerm, kept: Sequence[bool]) -> bool:
        """Whether a term counts while ``kept`` says, per block, what stays."""
        if term.block is None:
            return True
        if not term.when_removed:
            return kept[term.block]
        parent = self.blocks[term.block].parent
        return not kept[term.block] and (parent is None or kept[parent])

    def home_chain(self, term: ProblemTerm) -> tuple[int, ...]:
        """Blocks that are kept whenever the term counts, innermost first."""
        if term.block is None:
            return ()
        return self.chains[term.block][1 if term.when_removed else 0 :]

    def canonical(self, plan: ProblemStructure) -> ProblemStructure:
        """The plan with the last option on every dimension that only removed blocks use."""
        active = self.active_dimensions(plan)
        options = tuple(
            option if d in active else len(self.dimensions[d].options) - 1 for d, option in enumerate(plan.options)
        )
        return ProblemStructure(options, tuple(plan.kept))

    def active_dimensions(self, plan: ProblemStructure) -> set[int]:
        """Dimensions that a term uses whose blocks are kept."""
        return {d for term in self.terms if self.counts_in(term, plan.kept) for d in term.dimensions}

    def counts(self, plan: ProblemStructure) -> dict[str, int]:
        """Chosen count per dimension name."""
        return {d.name: d.options[k] for d, k in zip(self.dimensions, plan.options)}

    def removed_blocks(self, plan: ProblemStructure) -> list[str]:
        """Names of the removed blocks."""
        return [block.name for block, kept in zip(self.blocks, plan.kept) if not kept]

    def save(self, path: str | Path) -> None:
        """Write the versioned npz format, atomically."""
        meta = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "metrics": list(self.metrics),
            "dimensions": [{"name": d.name, "options": list(d.options)} for d in self.dimensions],
            "blocks": [{"name": b.name, "parent": b.parent} for b in self.blocks],
            "terms": [_term_meta(term) for term in self.terms],
            "global_dimensions": list(self.global_dimensions),
        }
        arrays: dict[str, np.ndarray] = {}
        for index, term in enumerate(self.terms):
            for metric in self.metrics:
                arrays[f"cost_{metric}_{index}"] = term.costs[metric]
            if term.value is not None:
                arrays[f"value_{index}"] = term.value
            if term.allowed is not None:
                arrays[f"allowed_{index}"] = term.allowed
        write_npz(path, meta, arrays)

    @classmethod
    def load(cls, path: str | Path) -> PruningProblem:
        """Read what `save` wrote; version 1 knows neither masks nor `when_removed` nor global dimensions.

        Raises:
            FileFormatError: Missing, truncated, of another version, or without a required field.
            InvalidProblemError: See the class.
        """
        meta, arrays = read_npz(path, what="pruning problem", schema_version=_READABLE)
        try:
            metrics = tuple(str(metric) for metric in meta["metrics"])
            return cls(
                name=str(meta["name"]),
                metrics=metrics,
                dimensions=tuple(ProblemDimension(d["name"], tuple(d["options"])) for d in meta["dimensions"]),
                blocks=tuple(ProblemBlock(b["name"], b["parent"]) for b in meta["blocks"]),
                terms=tuple(
                    ProblemTerm(
                        t["name"],
                        tuple(t["dimensions"]),
                        t["block"],
                        {metric: arrays[f"cost_{metric}_{index}"] for metric in metrics},
                        arrays.get(f"value_{index}"),
                        arrays.get(f"allowed_{index}"),
                        bool(t.get("when_removed", False)),
                    )
                    for index, t in enumerate(meta["terms"])
                ),
                global_dimensions=tuple(meta.get("global_dimensions", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError(f"pruning problem {path} lacks or misspells {error}; build it again") from error


def _term_meta(term: ProblemTerm) -> dict[str, Any]:
    meta = {"name": term.name, "dimensions": list(term.dimensions), "block": term.block}
    return {**meta, "when_removed": True} if term.when_removed else meta
