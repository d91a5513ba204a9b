"""Predicted against measured loss changes: single blocks on scenes of their own, random plans, returned plans.

    python benchmarks/loss_prediction.py --values work_dirs/mini_nuscenes --json docs/results/loss_prediction.json

``--values`` is a work directory of `tools/prune.py` or `tools/compare.py` with values in units of loss; its first
frames made the predictions. Everything is measured on frames of other scenes; what was measured is kept beside the JSON
file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from mdp_mmdet3d.adapters import adapter_of
from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import write_json
from mdp_mmdet3d.importance.loss_changes import measure_plans, single_cuts, spearman, split_reliability
from mdp_mmdet3d.importance.loss_probe import STREAM_FRAMES, LossProbe, stream_pieces
from mdp_mmdet3d.runner.loss_search import find_loss_search
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.runner.steps import find_importance, find_space
from mdp_mmdet3d.solver.build import Ranking, build_problem
from mdp_mmdet3d.solver.problem import ProblemStructure, PruningProblem
from mdp_mmdet3d.space.types import CostTerm, PruningSpace
from mdp_mmdet3d.surgery.plan import PruningPlan

SCHEMA_VERSION = 1
STRONGEST = 3.0  # random plans that multiply the loss by more are told apart by nobody


def random_plan(space: PruningSpace, order: Mapping[str, np.ndarray], seed: int) -> PruningPlan:
    """A plan of random strength: each dimension and each block is cut with one random probability of the plan."""
    generator = Random(seed)
    narrow, remove = generator.uniform(0.05, 0.6), generator.uniform(0.0, 0.3)
    kept = {}
    for dimension in space.dimensions:
        if generator.random() < narrow:
            best = order[dimension.name][:, : generator.choice(dimension.options)]
            kept[dimension.name] = tuple(tuple(sorted(map(int, copy))) for copy in best)
    drawn = {block.name for block in space.blocks if generator.random() < remove}
    removed = {b.name for b in space.blocks if not drawn.isdisjoint(space.chain(b.name))}
    return PruningPlan.from_kept(space, kept, removed)


class Free:
    """A latency that costs nothing: only the value of a plan is asked for."""

    total_fixed_ms = 0.0

    def cost_array(self, term: CostTerm, options: Any = None) -> tuple[np.ndarray, Any]:
        """0 for every option."""
        return np.zeros(()), None


def given_up(problem: PruningProblem, space: PruningSpace, plan: PruningPlan) -> float:
    """Value of the dense model minus that of a plan."""
    widths, removed = plan.widths(space), set(plan.removed)
    options = tuple(d.options.index(widths[d.name]) for d in space.dimensions)
    kept = tuple(removed.isdisjoint(space.chain(b.name)) for b in space.blocks)
    return problem.dense.value - problem.evaluate(ProblemStructure(options, kept)).value


def pieces_from(batches: Iterable[Any], first: int, length: int) -> Iterator[Any]:
    """Batches of the pieces of streams behind the first ones that hold ``first`` batches."""
    skipped = 0
    for piece in stream_pieces(batches, length):
        if skipped < first:
            skipped += len(piece)
        else:
            yield from piece


def row(name: str, a: np.ndarray, b: np.ndarray, **facts: Any) -> dict[str, Any]:
    """Rank correlation of two lists, printed and returned."""
    found = {"what": name, "count": len(a), "spearman": round(spearman(a, b), 3), **facts}
    print(found, flush=True)
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/streampetr_mini_mdp.py")
    parser.add_argument("--values", type=Path, required=True)
    parser.add_argument("--plans", type=int, default=30, help="random plans")
    parser.add_argument("--frames", type=int, default=128, help="to measure on")
    parser.add_argument("--block-frames", type=int, nargs="+", default=[32, 64, 128], help="to predict blocks from")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = read_config(args.config)
    settings = PruneSettings.from_config(config.prune)
    if settings.loss_values is None:
        raise MdpError(f"{args.config} does not ask for values in units of loss")
    adapter = adapter_of(config, settings.input_shape, settings.adapter)
    dense, weights = adapter.build(config.checkpoint)
    space = find_space(adapter, dense, settings, args.values / "space.json", print)
    importance = find_importance(adapter, dense, space, weights, settings.frames, args.values / "importance.npz", print)
    loss = replace(settings.loss_values, max_frames=max(settings.loss_values.max_frames, *args.block_frames))
    search = find_loss_search(adapter, dense, space, importance, weights, loss, args.values, print)
    others = LossProbe(
        dense,
        pieces_from(adapter.importance_batches(), loss.max_frames, STREAM_FRAMES),
        adapter.deployed_loss,
        args.json.with_suffix(".npz"),
        {"model": space.model_digest, "weights": weights, "data": adapter.data_identity(), "behind": loss.max_frames},
        round_frames=args.frames,
        max_frames=args.frames,
    )
    order = Ranking.by_importance(space, importance).order
    removals = {name: plan for (name, count), plan in single_cuts(space, order, 1).items() if count is None}
    rows = []

    measured = measure_plans(others, removals, "blocks on other scenes")
    there = np.array(list(measured.values()))
    predicted_frames = sorted(args.block_frames)
    for frames in predicted_frames:
        while search.probe.frames < frames and search.probe.more_frames():
            pass
        here = np.array(list(measure_plans(search.probe, removals, f"blocks, {frames} frames").values()))
        facts = {
            "frames": [search.probe.frames, others.frames],
            "reliability": [
                round(split_reliability(here, search.probe.pieces), 3),
                round(split_reliability(there, others.pieces), 3),
            ],
        }
        rows.append(row("single blocks, other scenes", here.mean(axis=1), there.mean(axis=1), **facts))

    plans = {f"random {seed}": random_plan(space, order, seed) for seed in range(args.plans)}
    changes = {name: float(found.mean()) for name, found in measure_plans(others, plans, "random plans").items()}
    ranking = Ranking.by_importance(space, importance)
    by_loss, first_order = (build_problem(space, importance, Free(), ranking, v) for v in (search.values, None))
    predicted = {name: given_up(by_loss, space, plan) for name, plan in plans.items()}
    lost = {name: given_up(first_order, space, plan) for name, plan in plans.items()}
    told = [name for name in plans if changes[name] < (STRONGEST - 1) * others.dense_loss]
    for title, names in (("random plans", list(plans)), ("random plans below 3 times the dense loss", told)):
        a = np.array([changes[name] for name in names])
        facts = {"first_order": round(spearman(np.array([lost[name] for name in names]), a), 3)}
        rows.append(row(title, np.array([predicted[name] for name in names]), a, **facts))

    for path in sorted(args.values.glob("plans/*/plan.json")):
        plan = PruningPlan.load(path)
        name = path.parent.name
        changes[name] = float(others.change(plan).mean())
        predicted[name] = given_up(by_loss, space, plan)
        print(f"{name}: predicted {predicted[name]:+.3f}, measured {changes[name]:+.3f}", flush=True)
    write_json(
        args.json,
        {
            "schema_version": SCHEMA_VERSION,
            "frames": {"predicted": search.values.changes.frames, "measured": others.frames},
            "dense_loss": others.dense_loss,
            "rows": rows,
            "blocks": {name: float(found.mean()) for name, found in measured.items()},
            "plans": {name: {"predicted": predicted[name], "measured": changes[name]} for name in changes},
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
