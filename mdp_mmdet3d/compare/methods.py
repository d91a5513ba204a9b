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


def magnitude(material: Material) -> Propose:
    """The same program, space and latencies; the values are norms of weights."""
    search = _search(material, magnitude_importance(material.dense, material.space, material.weights))
    return lambda knob: search.solve(knob * material.reference_ms)


def _baseline(material: Material, method: str) -> Propose:
    ranking = Ranking.by_importance(material.space, material.importance)
    problem = build_problem(material.space, material.importance, material.latency, ranking)
    path = uniform_path(problem) if method == "uniform" else []
    costs = [problem.evaluate(plan).costs[LATENCY] for plan in path]

    def propose(knob: float) -> PruningPlan:
        budget = knob * material.reference_ms
        if method == "halp":
            found = halp(problem, LATENCY, budget, steps=HALP_STEPS)
            if found.plan is None:
                raise InfeasibleBudgetError(found.note, budget)
            indices = found.plan
        else:
            indices = min(zip(path, costs), key=lambda item: abs(item[1] - budget))[0]
        return PruningPlan.from_kept(material.space, *kept_elements(material.space, ranking, indices), {})

    return propose


def halp_method(material: Material) -> Propose:
    """HALP's knapsack over first-order importance, with its schedule; no blocks are removed."""
    return _baseline(material, "halp")


def uniform(material: Material) -> Propose:
    """Every dimension narrowed alike, the elements of least first-order importance first; no blocks are removed."""
    return _baseline(material, "uniform")


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
