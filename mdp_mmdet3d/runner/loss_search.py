"""Plans by values in units of loss: measured single cuts, and a correction of them by what the plan did to the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mdp_mmdet3d.adapters import Adapter
from mdp_mmdet3d.files import write_json
from mdp_mmdet3d.importance.loss_changes import measure_loss_changes, measure_plans
from mdp_mmdet3d.importance.loss_probe import LossProbe
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.importance.values import LossChange, LossValues, standard_error
from mdp_mmdet3d.runner.optimise import PlanSearch
from mdp_mmdet3d.runner.settings import LossSettings
from mdp_mmdet3d.solver.build import Ranking, build_problem, kept_elements
from mdp_mmdet3d.solver.problem import ProblemStructure, PruningProblem
from mdp_mmdet3d.solver.rerank import RankedSolution
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.plan import PruningPlan

LOSSES_FILE, CHANGES_FILE = "losses.npz", "loss_changes.json"
SCHEMA_VERSION = 1
LARGEST_FACTOR = 4.0
"""A loss change is not corrected by more: one width within one plan says little about the others."""
UNREPAIRABLE = 100.0
"""Factor on the loss change of a layer that a candidate keeps, if the budget allows."""
UNDECIDED = 2.0
"""Standard errors of the difference within which two plans are not told apart."""


@dataclass(frozen=True)
class Candidate:
    """A plan that was measured, and what led to it.

    Attributes:
        record: For the report: plan hash, predicted and measured loss change, ``repaired`` where that was measured.
        values: Values that it was solved with; None: first-order importance.
        solution: Of the solver.
        changes: Measures the loss change per frame of what would be delivered, on the probe's frames of the time.
    """

    record: dict[str, Any]
    values: LossValues | None
    solution: RankedSolution
    changes: Callable[[], np.ndarray]


@dataclass
class LossSearch:
    """Finds plans by values in units of loss.

    Attributes:
        probe: Measures losses.
        values: Of single cuts.
        settings: How often to correct, and what the values were measured with.
        repaired: The repaired model of a plan; None where plans are not repaired.
        repaired_as: What ``repaired`` depends on besides the plan.
        say: Receives a line per plan.
        progress: Show a progress bar.
        report: About the last plan, for the report.
    """

    probe: LossProbe
    values: LossValues
    settings: LossSettings
    repaired: Callable[[PruningPlan], nn.Module] | None = None
    repaired_as: str = ""
    say: Callable[[str], None] = lambda line: None
    progress: bool = True
    report: dict[str, Any] = field(default_factory=dict)

    def solve(self, search: PlanSearch) -> PruningPlan:
        """Solve, measure the plan's loss, correct the values of what it cuts and solve again, while that helps.

        Values of single cuts add up only roughly. So each part that the plan cuts is put back by itself, and what that
        gains takes the place of the change that was measured by itself; parts that were not cut follow those of their
        kind. Where plans are repaired, which the values do not know of, more plans are candidates: those that keep the
        layers whose removal costs most (`_with_layers`), and that of first-order importance. The one with the lowest
        measured loss, repaired if it will be, is kept.

        Args:
            search: For the budget at hand; keeps values and solution of the best plan.
        """
        candidates = [self._candidate(search, self.values, "by single cuts")]
        for _ in range(self.settings.corrections):
            last = candidates[-1]
            found = self._candidate(search, self._corrected(search, last), "corrected")
            if found.record["plan"] == last.record["plan"]:
                break
            candidates.append(found)
            if found.record["measured"] >= last.record["measured"]:
                break
        if self.repaired is not None:
            candidates += [*self._with_layers(search, candidates[0]), self._candidate(search, None, "first order")]
        candidates = different(candidates)
        best, compared = self._best(candidates)
        search.values, search.solution = best.values, best.solution
        changes = self.values.changes
        self.report = {
            **best.record,
            "candidates": [candidate.record for candidate in candidates],
            "compared_frames": compared,
            "dense_loss": changes.dense_loss,
            "frames": changes.frames,
            "reliability": changes.reliability,
        }
        return search.plan()

    def _best(self, candidates: list[Candidate]) -> tuple[Candidate, int]:
        """The candidate of the lowest loss, and the frames that it took to tell.

        While others are within `UNDECIDED` standard errors of the difference to it, those are measured on another round
        of frames; the values, which many more measurements make, keep theirs.
        """
        left = candidates
        with self.probe.same_frames_afterwards():
            while True:
                losses = [candidate.changes() for candidate in left]
                for candidate, found in zip(left, losses):
                    candidate.record["compared"] = float(found.mean())
                left = [left[i] for i in undecided(losses, self.probe.pieces)]
                frames = self.probe.frames
                if len(left) == 1 or not self.probe.more_frames():
                    return left[0], frames
                self.say(f"{len(left)} plans cannot be told apart over {frames} frames: more frames")

    def delivered(self, model: nn.Module) -> dict[str, float]:
        """Loss change of a pruned model as it is, for the report."""
        change = LossChange.of(self.probe.change_of(model), self.probe.pieces)
        return {"delivered": change.mean, "delivered_error": change.error}

    def _candidate(self, search: PlanSearch, values: LossValues | None, how: str) -> Candidate:
        """Solve with these values, and measure."""
        search.values = values
        plan, solution = search.solve(), search.solution
        problem = solution.problem
        if values is None:
            ranking = Ranking.by_importance(search.space, search.importance)
            problem = build_problem(search.space, search.importance, search.latency, ranking, self.values)
        predicted = problem.dense.value - problem.evaluate(solution.result.plan).value
        change = LossChange.of(self.probe.change(plan), self.probe.pieces)
        record = {"how": how, "plan": plan.hash, "predicted": predicted, "measured": change.mean, "error": change.error}
        changes = partial(self.probe.change, plan)
        line = (
            f"candidate plan, {how}: loss {predicted:+.3f} predicted, {change.mean:+.3f} +- {change.error:.3f} measured"
        )
        build = self.repaired
        if build is not None:
            changes = partial(self.probe.change_finished, plan, self.repaired_as, partial(build, plan))
            after = LossChange.of(changes(), self.probe.pieces)
            record |= {"repaired": after.mean, "repaired_error": after.error}
            line += f", {after.mean:+.3f} +- {after.error:.3f} repaired"
        self.say(line)
        return Candidate(record, values, solution, changes)

    def _with_layers(self, search: PlanSearch, first: Candidate) -> list[Candidate]:
        """Plans that keep the costliest layer that the one before removed, each besides those kept already.

        As long as the budget allows it and the repaired plan is better for it.
        """
        found: list[Candidate] = []
        last, kept = first, {}
        while layer := self._costliest_layer(last):
            kept[layer] = UNREPAIRABLE
            search.values = values = self.values.corrected(kept)
            if not kept.keys().isdisjoint(search.solve().removed):
                break
            found.append(self._candidate(search, values, f"{' and '.join(kept)} kept"))
            if found[-1].record["repaired"] >= last.record["repaired"]:
                break
            last = found[-1]
        return found

    def _costliest_layer(self, candidate: Candidate) -> str | None:
        """The layer, a block that holds others, whose removal costs a plan most; None where none costs anything.

        Repair makes up for narrow widths better than for a layer that is gone, and the values do not know.
        """
        space, kept = self.values.space, candidate.solution.result.plan.kept
        removed = {block.name for block, stays in zip(space.blocks, kept) if not stays}
        changes = self.values.changes.blocks
        layers = removed & {block.parent for block in space.blocks if block.parent}
        costly = [name for name in layers if changes[name].mean > 0]
        return max(costly, key=lambda name: (changes[name].mean, name), default=None)

    def _corrected(self, search: PlanSearch, last: Candidate) -> LossValues:
        """Values in which every part that the last plan cuts costs what putting it back gains."""
        space, ranking = search.space, Ranking.by_importance(search.space, search.importance)
        plan, problem = last.solution.result.plan, last.solution.problem
        whole = self.probe.change(PruningPlan.from_kept(space, *last.solution.kept))
        parts = put_back(space, problem, plan)
        plans = {
            name: PruningPlan.from_kept(space, *kept_elements(space, ranking, without))
            for name, without in parts.items()
        }
        changes = measure_plans(self.probe, plans, "loss changes within the plan", self.progress)
        factors: dict[str, float] = {}
        kinds: dict[str, list[float]] = {}
        for name, without in parts.items():
            gain = LossChange.of(whole - changes[name])
            expected = problem.evaluate(without).value - problem.evaluate(plan).value
            # The error keeps a part that hardly counts from being multiplied by noise.
            noise = max(gain.error, 1e-6)
            factor = (max(gain.mean, 0.0) + noise) / (max(expected, 0.0) + noise)
            factors[name] = float(np.clip(factor, 1 / LARGEST_FACTOR, LARGEST_FACTOR))
            kinds.setdefault(_kind(space, name), []).append(factors[name])
        everywhere = float(np.median(list(factors.values()))) if factors else 1.0
        names = [*(b.name for b in space.blocks), *(d.name for d in space.dimensions)]
        alike = {name: float(np.median(kinds.get(_kind(space, name), [everywhere]))) for name in names}
        return (last.values or self.values).corrected({**alike, **factors})


def different(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The first of those that have the same plan; its record names what led to the others, too."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        first = found.setdefault(candidate.record["plan"], candidate)
        if first is not candidate:
            first.record["how"] += f", {candidate.record['how']}"
    return list(found.values())


def undecided(losses: Sequence[np.ndarray], pieces: np.ndarray) -> list[int]:
    """Which of several plans may be the best: that of the lowest mean, and those not clearly worse.

    Args:
        losses: Per plan, loss changes of the same frames, (frames,).
        pieces: (frames,) as for `standard_error`.
    """
    means = [float(each.mean()) for each in losses]
    best = int(np.argmin(means))
    found = [best]
    for i, each in enumerate(losses):
        difference = each - losses[best]
        if i == best or not difference.any():
            continue
        if means[i] - means[best] < UNDECIDED * standard_error(difference, pieces):
            found.append(i)
    return found


def put_back(space: PruningSpace, problem: PruningProblem, plan: ProblemStructure) -> dict[str, ProblemStructure]:
    """The plan with one part dense again: each dimension that it cuts, each outermost block that it removes."""
    found = {}
    active = problem.active_dimensions(plan)
    for index, dimension in enumerate(space.dimensions):
        last = len(dimension.options) - 1
        if index in active and plan.options[index] < last:
            options = (*plan.options[:index], last, *plan.options[index + 1 :])
            found[dimension.name] = ProblemStructure(options, plan.kept)
    kept = dict(zip((b.name for b in space.blocks), plan.kept))
    for block in space.blocks:
        if not kept[block.name] and (block.parent is None or kept[block.parent]):
            again = tuple(stays or block.name in space.chain(name) for name, stays in kept.items())
            found[block.name] = ProblemStructure(plan.options, again)
    return found


def _kind(space: PruningSpace, name: str) -> str:
    """What a part is and in which branch of the model it lies."""
    item = space.by_name.get(name) or space.blocks_by_name[name]
    return f"{name.partition('.')[0]} {item.kind.value}"


def find_loss_search(
    adapter: Adapter,
    dense: nn.Module,
    space: PruningSpace,
    importance: ImportanceTable,
    weights: str,
    settings: LossSettings,
    work_dir: Path,
    say: Callable[[str], None],
    repair: Callable[[nn.Module, PruningPlan], Any] | None = None,
    repair_identity: Any = None,
) -> LossSearch:
    """Measure the loss change of all single cuts, as far as ``work_dir`` does not hold them yet.

    Args:
        adapter: Gives the frames and their loss.
        dense: The dense model with its weights.
        space: What may be pruned.
        importance: Ranks the elements of a dimension.
        weights: Identity of the dense weights.
        settings: How to measure.
        work_dir: Holds what was measured.
        say: Receives lines for people.
        repair: Refits a pruned model before its loss is measured; None re-estimates batch norms.
        repair_identity: What ``repair`` depends on, JSON-able.
    """
    probe = LossProbe(
        dense,
        adapter.importance_batches(),
        adapter.deployed_loss,
        work_dir / LOSSES_FILE,
        {
            "model": space.model_digest,
            "weights": weights,
            "data": adapter.data_identity(),
            "repair": None if repair is None else repair_identity,
        },
        round_frames=settings.frames,
        max_frames=settings.max_frames,
        repair=repair,
        say=say,
    )
    order = Ranking.by_importance(space, importance).order
    changes = measure_loss_changes(probe, space, order, widths=settings.widths, say=say)
    values = LossValues(space, changes)
    write_json(work_dir / CHANGES_FILE, {"schema_version": SCHEMA_VERSION, **values.to_json()})
    return LossSearch(probe, values, settings, say=say)
