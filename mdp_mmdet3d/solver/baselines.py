"""What others do, for comparison: HALP's knapsack, uniform ratios, greedy removal, SCIP on the plain bilinear form.

A baseline's plan may break the budget by the true tables: it is returned as it is, and `Baseline.feasible` tells.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mdp_mmdet3d.errors import InfeasibleBudgetError, MdpError
from mdp_mmdet3d.solver.ablation import at_most, channels_only, linear_latency, with_all_blocks
from mdp_mmdet3d.solver.problem import ProblemStructure, PruningProblem
from mdp_mmdet3d.solver.proof import prove
from mdp_mmdet3d.solver.result import Formulation, SolveOptions
from mdp_mmdet3d.solver.route import solve
from mdp_mmdet3d.solver.scaling import within
from mdp_mmdet3d.solver.scip import ScipCrashError

_UNIFORM_RATIOS = 1000
_TIGHTENING_STEPS = 12


@dataclass(frozen=True)
class Baseline:
    """A baseline's plan, judged by the true tables.

    Attributes:
        method: Name for tables.
        plan: None where the method found none.
        value: Value of the plan.
        cost: Cost of the plan.
        feasible: Whether the cost keeps the budget.
        seconds: Wall-clock time.
        note: What went wrong, if anything.
    """

    method: str
    plan: ProblemStructure | None
    value: float
    cost: float
    feasible: bool
    seconds: float
    note: str = ""


def ablated(
    problem: PruningProblem,
    metric: str,
    budget: float,
    *,
    blocks: bool,
    linear: bool,
    options: SolveOptions | None = None,
) -> Baseline:
    """The paper's ablation: exact optimum with or without block removal, with joint or linear latency."""

    def run() -> ProblemStructure:
        reduced = problem if blocks else channels_only(problem)
        if linear:
            reduced = linear_latency(reduced, reduced.dense_plan)
        plan = solve(reduced, {metric: budget}, options).plan
        return plan if blocks else with_all_blocks(problem, plan)

    name = f"{'channels + blocks' if blocks else 'channels'}, {'linear' if linear else 'joint'} latency"
    return _judged(name, problem, metric, budget, run)


def halp(
    problem: PruningProblem,
    metric: str,
    budget: float,
    *,
    steps: int = 1,
    tighten: bool = False,
    options: SolveOptions | None = None,
) -> Baseline:
    """HALP's latency-saliency knapsack (Shen et al., NeurIPS 2022, section 3), solved exactly.

    The latency of a channel is what it adds to its own layer at the present number of inputs; blocks are not
    removed. With a schedule the budgets shrink geometrically from dense to target and the latency is looked up again
    after each step (section 3.2).

    Args:
        problem: The problem with its joint tables.
        metric: Cost to limit.
        budget: Its budget.
        steps: Steps of the schedule.
        tighten: Shrink the knapsack's own budget until the plan keeps the true one, or raise it while it does.
        options: As for `solve`.
    """
    channels = channels_only(problem)

    def knapsack(target: float) -> ProblemStructure:
        plan = channels.dense_plan
        for fraction in np.arange(1, steps + 1) / steps:
            step = channels.dense.costs[metric] ** (1.0 - fraction) * target**fraction
            reduced = at_most(linear_latency(channels, plan), plan)
            plan = solve(reduced, {metric: step}, options).plan
        return with_all_blocks(problem, plan)

    def tightened() -> ProblemStructure:
        low, high = 0.0, 2.0 * max(channels.dense.costs[metric], budget)
        best: tuple[float, ProblemStructure] | None = None
        for _ in range(_TIGHTENING_STEPS):
            middle = (low + high) / 2.0
            try:
                plan = knapsack(middle)
            except InfeasibleBudgetError:
                low = middle
                continue
            evaluation = problem.evaluate(plan)
            if within(budget, evaluation.costs[metric]):
                low = middle
                if best is None or evaluation.value > best[0]:
                    best = (evaluation.value, plan)
            else:
                high = middle
        if best is None:
            raise InfeasibleBudgetError(f"no knapsack budget leads to a plan within {budget:.6g}", float("nan"))
        return best[1]

    name = "HALP" + (f", {steps} steps" if steps > 1 else "") + (", fitted" if tighten else "")
    return _judged(name, problem, metric, budget, tightened if tighten else lambda: knapsack(budget))


def uniform(problem: PruningProblem, metric: str, budget: float) -> Baseline:
    """The same ratio everywhere: per ratio the largest option that does not exceed it, the best that fits."""
    _check_free(problem, "uniform ratios")

    def run() -> ProblemStructure:
        best: tuple[float, ProblemStructure] | None = None
        seen = set()
        for ratio in np.linspace(1.0, 0.0, _UNIFORM_RATIOS + 1):
            options = tuple(
                max(int(np.searchsorted(d.options, ratio * d.options[-1] * (1 + 1e-12), side="right")) - 1, 0)
                for d in problem.dimensions
            )
            if options in seen:
                continue
            seen.add(options)
            plan = ProblemStructure(options, (True,) * len(problem.blocks))
            evaluation = problem.evaluate(plan)
            if within(budget, evaluation.costs[metric]) and (best is None or evaluation.value > best[0]):
                best = (evaluation.value, plan)
        if best is None:
            raise InfeasibleBudgetError(f"no uniform ratio fits a budget of {budget:.6g}", float("nan"))
        return best[1]

    return _judged("uniform", problem, metric, budget, run)


def uniform_path(problem: PruningProblem) -> list[ProblemStructure]:
    """Plans from dense to smallest that narrow all dimensions alike; neighbours differ in one option of one dimension.

    The option to give up next is the one whose next smaller count is the largest share of its dense count.
    """
    _check_free(problem, "uniform ratios")
    options = [len(d.options) - 1 for d in problem.dimensions]
    kept = (True,) * len(problem.blocks)
    path = [ProblemStructure(tuple(options), kept)]
    while any(options):
        _, index = max(
            (d.options[k - 1] / d.options[-1], -i) for i, (d, k) in enumerate(zip(problem.dimensions, options)) if k
        )
        options[-index] -= 1
        path.append(ProblemStructure(tuple(options), kept))
    return path


def greedy(problem: PruningProblem, metric: str, budget: float) -> Baseline:
    """From dense, take the step that loses least value per cost saved: fewer of one count, or a block less."""
    _check_free(problem, "greedy steps")
    return _judged("greedy", problem, metric, budget, lambda: _Greedy(problem, metric).run(budget))


def direct(problem: PruningProblem, metric: str, budget: float, *, time_limit_s: float = 60.0) -> Baseline:
    """SCIP on the bilinear model of the whole problem, without any other phase."""

    def run() -> ProblemStructure:
        answer = prove(
            problem,
            {metric: budget},
            value_unit=problem.most_value - problem.least_value or 1.0,
            gap=1e-6,
            time_limit_s=time_limit_s,
            formulation=Formulation.FOLDED,
        )
        notes.extend(answer.warnings)
        if answer.plan is None:
            raise InfeasibleBudgetError(f"SCIP found nothing in {time_limit_s:.0f} s", float("nan"))
        return answer.plan

    notes: list[str] = []
    return _judged("SCIP, bilinear", problem, metric, budget, run, notes)


class _Greedy:
    """Keeps per dimension what value and cost each option would have, and updates only what a step touches."""

    def __init__(self, problem: PruningProblem, metric: str) -> None:
        self.problem = problem
        self.metric = metric
        self.options = list(problem.dense_plan.options)
        self.kept = list(problem.dense_plan.kept)
        self.terms_of: list[list[int]] = [[] for _ in problem.dimensions]
        for index, term in enumerate(problem.terms):
            for dimension in term.dimensions:
                self.terms_of[dimension].append(index)
        self.tables = [self._table(dimension) for dimension in range(len(problem.dimensions))]

    def run(self, budget: float) -> ProblemStructure:
        """Step until the budget is kept."""
        while True:
            plan = ProblemStructure(tuple(self.options), tuple(self.kept))
            now = self.problem.evaluate(plan)
            if within(budget, now.costs[self.metric]):
                return self.problem.canonical(plan)
            move = min((m for m in (*self._counts(), *self._blocks(now.costs[self.metric], now.value))), default=None)
            if move is None:
                raise InfeasibleBudgetError(
                    f"greedy steps end at {now.costs[self.metric]:.6g}, above the budget of {budget:.6g}",
                    now.costs[self.metric],
                )
            self._apply(*move[1:])

    def _table(self, dimension: int) -> np.ndarray:
        """``(2, options)``: value and cost of the kept terms on a dimension, all else as it is."""
        total = np.zeros((2, len(self.problem.dimensions[dimension].options)))
        for index in self.terms_of[dimension]:
            term = self.problem.terms[index]
            if self.problem.counts_in(term, self.kept):
                place = tuple(slice(None) if d == dimension else self.options[d] for d in term.dimensions)
                total[1] += term.costs[self.metric][place]
                if term.value is not None:
                    total[0] += term.value[place]
        return total

    def _counts(self) -> list[tuple[float, str, int, int]]:
        moves = []
        for dimension, ((values, costs), option) in enumerate(zip(self.tables, self.options)):
            lost, saved = values[option] - values[:option], costs[option] - costs[:option]
            useful = np.flatnonzero(saved > 0)
            if len(useful):
                ratios = lost[useful] / saved[useful]
                best = useful[int(np.argmin(ratios))]
                moves.append((float(ratios.min()), "count", dimension, int(best)))
        return moves

    def _blocks(self, cost: float, value: float) -> list[tuple[float, str, int, int]]:
        moves = []
        for block, kept in enumerate(self.kept):
            if kept:
                flags = tuple(k and block not in self.problem.chains[b] for b, k in enumerate(self.kept))
                after = self.problem.evaluate(ProblemStructure(tuple(self.options), flags))
                saved = cost - after.costs[self.metric]
                if saved > 0:
                    moves.append(((value - after.value) / saved, "block", block, 0))
        return moves

    def _apply(self, kind: str, index: int, option: int) -> None:
        if kind == "count":
            self.options[index] = option
            touched = {d for term in self.terms_of[index] for d in self.problem.terms[term].dimensions}
        else:
            for block, chain in enumerate(self.problem.chains):
                self.kept[block] &= index not in chain
            touched = set(range(len(self.options)))
        for dimension in touched:
            self.tables[dimension] = self._table(dimension)


def _check_free(problem: PruningProblem, method: str) -> None:
    """These methods choose every count by itself, which masks do not let them."""
    masked = next((term.name for term in problem.terms if term.allowed is not None), None)
    if masked is not None:
        raise MdpError(
            f"{method} choose every count by itself, but term {masked!r} of {problem.name!r} ties counts together; "
            "compare with HALP, which is solved under the same masks"
        )


def _judged(
    method: str,
    problem: PruningProblem,
    metric: str,
    budget: float,
    run: Callable[[], ProblemStructure],
    notes: list[str] | None = None,
) -> Baseline:
    start = time.perf_counter()
    try:
        plan = run()
    except (InfeasibleBudgetError, ScipCrashError) as error:
        return Baseline(method, None, float("nan"), float("nan"), False, time.perf_counter() - start, str(error))
    seconds = time.perf_counter() - start
    evaluation = problem.evaluate(plan)
    cost = evaluation.costs[metric]
    return Baseline(method, plan, evaluation.value, cost, within(budget, cost), seconds, "; ".join(notes or ()))
