"""Search for the plan of a budget: solve, measure what the plan uses, solve again; correct by what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mdp_mmdet3d.errors import InfeasibleBudgetError
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.importance.values import LossValues
from mdp_mmdet3d.latency.backends.base import Backend
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.predict import LatencyModel
from mdp_mmdet3d.latency.sampling import EntryKey, entries_of
from mdp_mmdet3d.report.summary import decimals
from mdp_mmdet3d.solver import PruningProblem, SolveOptions, SolveResult, solve
from mdp_mmdet3d.solver.build import LATENCY
from mdp_mmdet3d.solver.rerank import RankedSolution, solve_ranked
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.plan import PruningPlan

ACTIVE_ROUNDS = 8
WORTH_A_BAR = 20  # entries; fewer take a second or two


@dataclass
class PlanSearch:
    """State of the search for one budget.

    Attributes:
        space: What may be pruned.
        importance: What each part is worth.
        latency: What each part costs; replaced as measuring and correction go on.
        backend: Measures entries that the plan uses and the table lacks; None where the table is of another device:
            then such entries stay interpolated.
        table_path: Where the table is kept; None without a backend.
        budget_ms: End-to-end budget per frame.
        time_limit_s: Limit of one solve.
        say: Receives a line per solution.
        provenance: Further facts for the plan's ``info``.
        values: Values in units of loss; None: the sums of ``importance``.
    """

    space: PruningSpace
    importance: ImportanceTable
    latency: LatencyModel
    backend: Backend | None
    table_path: Path | None
    budget_ms: float
    time_limit_s: float
    say: Callable[[str], None] = lambda line: None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    corrections: int = 0
    values: LossValues | None = None
    _solution: RankedSolution | None = field(default=None, repr=False)
    _factors: dict[str, list[float]] = field(default_factory=dict, repr=False)
    _applied: dict[str, float] = field(default_factory=dict, repr=False)

    @property
    def solution(self) -> RankedSolution:
        """Of the last `solve`."""
        if self._solution is None:
            raise RuntimeError("solve() has not been called")
        return self._solution

    @solution.setter
    def solution(self, solution: RankedSolution) -> None:
        self._solution = solution

    def solve(self, budget_ms: float | None = None) -> PruningPlan:
        """Solve until every table entry that the plan uses was measured, once if nothing can be measured.

        Args:
            budget_ms: Another budget from here on.

        Raises:
            InfeasibleBudgetError: No structure meets the budget.
        """
        if budget_ms is not None:
            self.budget_ms = budget_ms
        for _ in range(ACTIVE_ROUNDS):
            self._solution = solve_ranked(self.space, self.importance, self.latency, self._solve_once, self.values)
            plan = self.plan()
            widths, removed = plan.widths(self.space), set(plan.removed)
            missing = [p for p in entries_of(self.space, widths, removed) if self.latency.table.get(*p) is None]
            result = self.solution.result
            digits = decimals(self.budget_ms)
            how = "interpolated" if self.backend is None else "measured now"
            self.say(
                f"{result.status.value} plan, gap {result.gap:.1e}: {result.costs[LATENCY]:.{digits}f} ms predicted of "
                f"{self.budget_ms:.{digits}f} ms, value kept {result.objective:.6g}; "
                f"{result.seconds.get('total', 0.0):.1f} s"
                + (f"; {len(missing)} table entries that it uses are {how}" if missing else "")
            )
            if not missing or self.backend is None or self.table_path is None:
                break
            table = measure_latency(
                self.space,
                self.backend,
                self.table_path,
                policy="none",
                extra=missing,
                progress=len(missing) > WORTH_A_BAR,
            )
            self.latency = replace(self.latency, table=table)
        return self.plan()

    def _solve_once(self, problem: PruningProblem) -> SolveResult:
        try:
            return solve(problem, {LATENCY: self.budget_ms}, SolveOptions(time_limit_s=self.time_limit_s))
        except InfeasibleBudgetError as error:
            reachable = f"{math.ceil(error.minimum * 1000) / 1000:.3f} ms"  # rounded up, so that it can be met
            fixed = f"{self.latency.total_fixed_ms:.1f} ms of it is not prunable"
            raise InfeasibleBudgetError(
                f"budget of {self.budget_ms:.3f} ms cannot be reached on {self.latency.table.device}: the fastest "
                f"allowed structure takes {reachable} ({fixed}). Raise the budget to {reachable}, or allow more: "
                "prune.freeze, prune.min_keep",
                error.minimum,
            ) from error

    def plan(self) -> PruningPlan:
        """The last solution as a plan."""
        kept, removed = self.solution.kept
        result = self.solution.result
        return PruningPlan.from_kept(
            self.space,
            kept,
            removed,
            {
                "budget_ms": self.budget_ms,
                "predicted_ms": result.costs[LATENCY],
                "status": result.status.value,
                "objective": result.objective,
                "bound": result.bound,
                **({} if self.values is None else {"predicted_loss_change": self.predicted_loss_change}),
                **self.provenance,
            },
        )

    def correct(self, measured_engines_ms: dict[str, float]) -> None:
        """Scale the prediction of every engine by what the plans so far took whole, as the last one just did.

        The factor is the median over these plans, which are much alike: one disturbed measurement moves it little.
        """
        plan = self.plan()
        predicted = self.latency.predict_engines(plan.widths(self.space), set(plan.removed))
        for engine, ms in predicted.items():
            self._factors.setdefault(engine, []).append(
                measured_engines_ms[engine] / ms * self._applied.get(engine, 1.0)
            )
        factors = {engine: statistics.median(values) for engine, values in self._factors.items()}
        change = {engine: factor / self._applied.get(engine, 1.0) for engine, factor in factors.items()}
        self._applied = factors
        self.latency = replace(
            self.latency,
            fixed_ms={engine: ms * change[engine] for engine, ms in self.latency.fixed_ms.items()},
            scale={engine: scale * change[engine] for engine, scale in self.latency.scale.items()},
        )
        self.corrections += 1

    @property
    def predicted_loss_change(self) -> float:
        """Of the last plan, where values are in units of loss: what it is worth less than the dense one."""
        return self.solution.problem.dense.value - self.solution.result.objective

    @property
    def predicted_ms(self) -> float:
        """Of the last plan."""
        return self.solution.result.costs[LATENCY]

    @property
    def dense_predicted_ms(self) -> float:
        """Of the dense model, under the present correction."""
        return self.latency.predict({})

    @property
    def interpolated_entries(self) -> list[EntryKey]:
        """Table entries of the last plan that were not measured."""
        plan = self.plan()
        return self.latency.interpolated_entries(plan.widths(self.space), set(plan.removed))

    def breakdown(self) -> dict[str, dict[str, float]]:
        """Predicted milliseconds per module, dense and pruned."""
        plan = self.plan()
        return {
            "dense": self.latency.breakdown({}),
            "pruned": self.latency.breakdown(plan.widths(self.space), set(plan.removed)),
        }
