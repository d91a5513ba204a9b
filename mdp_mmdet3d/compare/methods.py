"""The methods that are compared: each a function from its own knob, a share of the dense latency, to a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mdp_mmdet3d.adapters import Adapter
from mdp_mmdet3d.compare.magnitude import magnitude_importance
from mdp_mmdet3d.compare.torch_pruning import torch_pruning_plan
from mdp_mmdet3d.compare.tuning import Propose
from mdp_mmdet3d.errors import InfeasibleBudgetError, MdpError
from mdp_mmdet3d.extras import check_installed
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.latency.backends.base import Backend
from mdp_mmdet3d.latency.predict import LatencyModel
from mdp_mmdet3d.runner.loss_search import LossSearch
from mdp_mmdet3d.runner.optimise import PlanSearch
from mdp_mmdet3d.solver import ProblemStructure, PruningProblem, SolveOptions, solve
from mdp_mmdet3d.solver.ablation import channels_only, linear_latency, with_all_blocks
from mdp_mmdet3d.solver.baselines import halp, uniform_path
from mdp_mmdet3d.solver.build import LATENCY, Ranking, build_problem, kept_elements
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.plan import PruningPlan

HALP_STEPS = 4  # of HALP's schedule


@dataclass(frozen=True)
class Material:
    """What every method starts from.

    Attributes:
        adapter: Of the model.
        dense: The dense model with its weights.
        weights: Their identity.
        space: What may be pruned.
        importance: First-order importance.
        latency: What each part costs.
        backend: Measures what the table lacks.
        table_path: The table's file.
        reference_ms: Dense latency that knobs are shares of.
        time_limit_s: Limit of one solve.
        loss: Values in units of loss, for MDP; None where the config asks for first-order importance.
        channel_multiple: Smallest step of channels.
        say: Receives lines for people.
    """

    adapter: Adapter
    dense: nn.Module
    weights: str
    space: PruningSpace
    importance: ImportanceTable
    latency: LatencyModel
    backend: Backend
    table_path: Path
    reference_ms: float
    time_limit_s: float
    loss: LossSearch | None
    channel_multiple: int
    say: Callable[[str], None]


def _search(material: Material, importance: ImportanceTable) -> PlanSearch:
    return PlanSearch(
        material.space,
        importance,
        material.latency,
        material.backend,
        material.table_path,
        0.0,
        material.time_limit_s,
        lambda line: None,
    )


def mdp(material: Material) -> Propose:
    """The program of this package with the values that the config asks for, as ``tools/prune.py`` solves it."""
    search = _search(material, material.importance)

    def propose(knob: float) -> PruningPlan:
        search.budget_ms = knob * material.reference_ms
        return search.solve() if material.loss is None else material.loss.solve(search)

    return propose


def mdp_taylor(material: Material) -> Propose:
    """The same program with first-order importance, as in the paper, whatever the config asks for."""
    search = _search(material, material.importance)
    return lambda knob: search.solve(knob * material.reference_ms)


def magnitude(material: Material) -> Propose:
    """The same program, space and latencies; the values are norms of weights."""
    search = _search(material, magnitude_importance(material.dense, material.space, material.weights))
    return lambda knob: search.solve(knob * material.reference_ms)


def _problem(material: Material) -> tuple[PruningProblem, Callable[[ProblemStructure], PruningPlan]]:
    """The program with first-order importance, and what makes a plan of its structures."""
    ranking = Ranking.by_importance(material.space, material.importance)
    problem = build_problem(material.space, material.importance, material.latency, ranking)

    def plan(structure: ProblemStructure) -> PruningPlan:
        return PruningPlan.from_kept(material.space, *kept_elements(material.space, ranking, structure), {})

    return problem, plan


def halp_method(material: Material) -> Propose:
    """HALP's knapsack over first-order importance, with its schedule; no blocks are removed."""
    problem, plan = _problem(material)

    def propose(knob: float) -> PruningPlan:
        budget = knob * material.reference_ms
        found = halp(problem, LATENCY, budget, steps=HALP_STEPS)
        if found.plan is None:
            raise InfeasibleBudgetError(found.note, budget)
        return plan(found.plan)

    return propose


def uniform(material: Material) -> Propose:
    """Every dimension narrowed alike, the elements of least first-order importance first; no blocks are removed."""
    problem, plan = _problem(material)
    path = uniform_path(problem)
    costs = [problem.evaluate(structure).costs[LATENCY] for structure in path]

    def propose(knob: float) -> PruningPlan:
        budget = knob * material.reference_ms
        return plan(min(zip(path, costs), key=lambda item: abs(item[1] - budget))[0])

    return propose


def ablation(channels: bool, linear: bool) -> Callable[[Material], Propose]:
    """The paper's ablation of the program with first-order importance.

    Args:
        channels: Every block stays.
        linear: What a count saves does not depend on the other counts.
    """

    def start(material: Material) -> Propose:
        whole, plan = _problem(material)
        problem = channels_only(whole) if channels else whole
        if linear:
            problem = linear_latency(problem, problem.dense_plan)
        options = SolveOptions(time_limit_s=material.time_limit_s)
        # What costs add up to under this model of latency differs from the reference: the knob is a share of it.
        dense_ms = problem.dense.costs[LATENCY]

        def propose(knob: float) -> PruningPlan:
            found = solve(problem, {LATENCY: knob * dense_ms}, options)
            return plan(with_all_blocks(whole, found.plan) if channels else found.plan)

        return propose

    return start


def torch_pruning(material: Material) -> Propose:
    """The library's group pruner on the same traced model; the knob is the share of channels that stay."""
    return lambda knob: torch_pruning_plan(
        material.adapter, material.dense, material.space, 1.0 - knob, material.channel_multiple
    )


@dataclass(frozen=True)
class Method:
    """A method by its name on the command line.

    Attributes:
        title: For tables and plots.
        start: Makes its `Propose`.
        version: Of what it does, for the identity of kept plans.
        needs: Python module that it needs beyond what the line needs.
    """

    title: str
    start: Callable[[Material], Propose]
    version: Any = 1
    needs: str = ""


METHODS = {
    "mdp": Method("MDP (this package)", mdp, 2),
    "mdp-taylor": Method("MDP (Taylor)", mdp_taylor),
    "mdp-channels": Method("MDP (Taylor), channels only", ablation(channels=True, linear=False)),
    "mdp-linear": Method("MDP (Taylor), linear latency", ablation(channels=False, linear=True)),
    "mdp-channels-linear": Method("MDP (Taylor), channels only, linear latency", ablation(channels=True, linear=True)),
    "halp": Method("HALP", halp_method, HALP_STEPS),
    "uniform": Method("uniform", uniform),
    "magnitude": Method("magnitude", magnitude),
    "torch-pruning": Method("torch-pruning", torch_pruning, needs="torch_pruning"),
}


def check_methods(names: list[str]) -> None:
    """Raise `MdpError` on an unknown or repeated method, `MissingExtraError` where its library is missing."""
    for name in names:
        if name not in METHODS:
            raise MdpError(f"--methods: there is no method {name!r}; choose from {', '.join(METHODS)}")
        if names.count(name) > 1:
            raise MdpError(f"--methods: {name!r} is named {names.count(name)} times")
        if METHODS[name].needs:
            check_installed(METHODS[name].needs, "all", f"the method {name}")


def labelled(propose: Propose, name: str) -> Propose:
    """The same, with the method's name in every plan."""

    def named(knob: float) -> PruningPlan:
        plan = propose(knob)
        return replace(plan, info={**plan.info, "method": name})

    return named
