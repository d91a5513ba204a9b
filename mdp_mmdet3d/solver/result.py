"""What `solve` is told and what it answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from mdp_mmdet3d.solver.problem import ProblemStructure

FEASIBILITY_TOLERANCE = 1e-9
"""Largest relative excess over a budget that a plan may have, by the original tables."""


class SolveStatus(str, Enum):
    """How a solve ended. An impossible budget is no status but an `InfeasibleBudgetError`."""

    OPTIMAL = "optimal"  # the gap is closed to `SolveOptions.gap`
    LIMIT = "limit"  # the plan is feasible, `SolveResult.gap` says how far from proven it is


class Formulation(str, Enum):
    """How SCIP is told the products of one-hots."""

    AUTO = "auto"  # linearised unless that is too large
    LINEARISED = "linearised"  # MILP with local marginals
    FOLDED = "folded"  # MINLP with bilinear terms


@dataclass(frozen=True)
class SolveOptions:
    """Settings of `solve`. The phases change the time, never the answer.

    Attributes:
        gap: Relative gap at which a plan counts as optimal.
        time_limit_s: Wall-clock limit; the best plan found by then is returned with its gap.
        lagrangian: Minimise the Lagrangian bound; off, the multipliers stay 0.
        reduction: Remove options and blocks by max-marginals.
        label_search: Search for the optimum by exact dynamic programming.
        scip: Let SCIP prove what is left open.
        formulation: Model that SCIP gets.
        isolate: Run SCIP in a child process that can be killed.
    """

    gap: float = 1e-6
    time_limit_s: float = 600.0
    lagrangian: bool = True
    reduction: bool = True
    label_search: bool = True
    scip: bool = True
    formulation: Formulation = Formulation.AUTO
    isolate: bool = True


@dataclass(frozen=True)
class Combinations:
    """What became of the combinations of the global dimensions' options.

    Attributes:
        total: How many there are.
        infeasible: No plan within the budgets.
        dropped: Ruled out by their bounds.
        solved: Solved, the best one to the optimum, the others until they could not be better.
        open: Left at a limit.
    """

    total: int
    infeasible: int
    dropped: int
    solved: int
    open: int


@dataclass(frozen=True)
class SolveResult:
    """The answer of `solve`.

    Attributes:
        plan: Canonical: dimensions that only removed blocks use are at their last option.
        objective: Value of the plan by the original tables.
        bound: No plan within the budgets is worth more.
        gap: ``(bound - objective) / objective``, 0 where the bound is met; both counted from the least value of any
            plan where values are negative.
        status: Whether the gap is closed.
        budgets: Per limited metric, the budget in the metric's unit.
        costs: Per metric, the plan's cost by the original tables.
        minimum: Per limited metric, the smallest cost that any plan reaches.
        minimum_all_blocks: The same while every block stays, None where masks exclude that.
        proof: What closed the gap: ``"label search"``, ``"lagrangian bound"``, ``"scip/linearised"``,
            ``"scip/folded"`` or ``""``.
        seconds: Wall-clock time per phase.
        states_total: Options and block states before any was removed.
        states_removed: How many of them the reduction removed.
        warnings: Limits that were hit, crashes that were answered; empty as a rule.
        certificate: What `certify` found on the original tables.
        combinations: Of a problem with global dimensions.
    """

    plan: ProblemStructure
    objective: float
    bound: float
    gap: float
    status: SolveStatus
    budgets: dict[str, float]
    costs: dict[str, float]
    minimum: dict[str, float]
    minimum_all_blocks: dict[str, float | None]
    proof: str
    seconds: dict[str, float]
    states_total: int
    states_removed: int
    warnings: tuple[str, ...] = ()
    certificate: dict[str, Any] = field(default_factory=dict)
    combinations: Combinations | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        return {
            "status": self.status.value,
            "objective": self.objective,
            "bound": self.bound,
            "gap": self.gap,
            "budgets": self.budgets,
            "costs": self.costs,
            "minimum": self.minimum,
            "minimum_all_blocks": self.minimum_all_blocks,
            "proof": self.proof,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
            "states_removed": self.states_removed,
            "states_total": self.states_total,
            "certificate": self.certificate,
            **({} if self.combinations is None else {"combinations": asdict(self.combinations)}),
            **self.plan.to_json(),
        }


def relative_gap(objective: float, bound: float) -> float:
    """``(bound - objective) / |objective|``; 0 where the bound is met, infinity where nothing is proven."""
    if bound <= objective:
        return 0.0
    return (bound - objective) / abs(objective) if objective else float("inf")
