"""Plans of the methods of `fashion_mnist.py` at equal measured latency."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from mmengine.config import Config
from rich.console import Console
from rich.progress import Progress

from mdp_mmdet3d.adapters import adapter_of
from mdp_mmdet3d.compare.tuning import Propose, tune
from mdp_mmdet3d.errors import InfeasibleBudgetError
from mdp_mmdet3d.files import read_json, write_json
from mdp_mmdet3d.latency.backends.onnxruntime import OnnxRuntimeBackend
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.predict import LatencyModel
from mdp_mmdet3d.onnx.macs import count_macs
from mdp_mmdet3d.runner.optimise import PlanSearch
from mdp_mmdet3d.runner.outputs import save_pruned_checkpoint, write_pruned_config
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.runner.steps import (
    MEASURED_FRAMES,
    TABLE_FILE,
    export_model,
    find_importance,
    find_networks,
    find_space,
    frame_engine_files,
    measure_models,
)
from mdp_mmdet3d.runtime.measure import LatencyStats, session_device
from mdp_mmdet3d.solver.baselines import halp, uniform_path
from mdp_mmdet3d.solver.build import LATENCY, Ranking, build_problem, kept_elements
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.plan import PruningPlan

SCHEMA_VERSION = 1
SESSIONS = 3  # of the final measurement
HALP_STEPS = 4  # of HALP's schedule


class Comparison:
    """The steps of a pruning job, with other methods beside MDP."""

    def __init__(
        self, config: Config, settings: PruneSettings, work_dir: Path, checkpoint: str, console: Console
    ) -> None:
        self.config, self.settings, self.work_dir = config, settings, work_dir
        self.checkpoint, self.console = checkpoint, console
        self.adapter = adapter_of(config, settings.input_shape, settings.adapter)

    def prepare(self) -> None:
        """Importance, latency table, whole networks: what all methods start from, reused if it is there."""
        self.work_dir.mkdir(parents=True, exist_ok=True)
        adapter, settings, folder, say = self.adapter, self.settings, self.work_dir, self.console.print
        self.dense, self.weights = adapter.build(self.checkpoint)
        self.frames = adapter.frames(self.dense, MEASURED_FRAMES)
        self.space = find_space(adapter, self.dense, settings, folder / "space.json", say)
        self.importance = find_importance(
            adapter, self.dense, self.space, self.weights, settings.frames, folder / "importance.npz", say
        )
        export_model(adapter, self.dense, folder / "onnx" / "dense", None, self.weights, say)
        networks = find_networks(
            adapter, self.dense, self.space, settings, folder, self.weights, self.side_by_side, say
        )
        self.reference_ms = sum(networks[0].engines_ms.values())
        self.backend = OnnxRuntimeBackend()
        table = measure_latency(self.space, self.backend, self.work_dir / TABLE_FILE)
        self.latency = LatencyModel.fit(self.space, table, networks)
        for line in self.latency.explanation:
            self.console.print(line)
        self.dense_ms: list[float] = []

    def propose(self, method: str) -> Propose:
        """The method as a function of its knob."""
        if method == "mdp":
            search = PlanSearch(
                self.space,
                self.importance,
                self.latency,
                self.backend,
                self.work_dir / TABLE_FILE,
                0.0,
                self.settings.time_limit_s,
                self.console.print,
            )

            def mdp(knob: float) -> PruningPlan:
                plan = search.solve(knob * self.reference_ms)
                kept = search.solution.result.objective / search.solution.problem.dense.value
                return replace(plan, info={**plan.info, "method": method, "importance_kept": kept})

            return mdp
        ranking = Ranking.by_importance(self.space, self.importance)
        problem = build_problem(self.space, self.importance, self.latency, ranking)
        path = uniform_path(problem)
        costs = [problem.evaluate(plan).costs[LATENCY] for plan in path]

        def baseline(knob: float) -> PruningPlan:
            budget = knob * self.reference_ms
            if method == "halp":
                found = halp(problem, LATENCY, budget, steps=HALP_STEPS)
                if found.plan is None:
                    raise InfeasibleBudgetError(found.note, budget)
                indices = found.plan
            else:
                indices = min(zip(path, costs), key=lambda item: abs(item[1] - budget))[0]
            kept, removed = kept_elements(self.space, ranking, indices)
            value = problem.evaluate(indices).value / problem.dense.value
            return PruningPlan.from_kept(self.space, kept, removed, {"method": method, "importance_kept": value})

        return baseline

    def folder(self, method: str, share: float) -> Path:
        """Where a plan and its pruned model lie."""
        return self.work_dir / "plans" / f"{method}_{share:g}"

    def plan(self, method: str, share: float) -> Path:
        """Find the plan of a method for a share of the latency, unless an earlier run did; returns its folder."""
        folder = self.folder(method, share)
        identity = {
            "method": [method, HALP_STEPS] if method == "halp" else [method],
            "weights": self.weights,
            "space": self.space.hash,
            "frames": self.settings.frames,
            "device": asdict(session_device()),
        }
        if (folder / "tuned.json").is_file():
            kept = read_json(folder / "tuned.json", what="tuned plan", schema_version=SCHEMA_VERSION)
            if kept["identity"] == identity:
                return folder
        folder.mkdir(parents=True, exist_ok=True)

        def measure(plan: PruningPlan) -> float:
            self.cut(plan, folder)
            return self.against_dense(folder)[0]

        found = tune(self.propose(method), measure, share)
        pruned = self.cut(found.plan, folder)
        found.plan.save(folder / "plan.json")
        save_pruned_checkpoint(folder / "pruned.pth", pruned, found.plan, self.weights, self.adapter.class_names)
        write_pruned_config(folder / "pruned_config.py", self.config)
        write_json(
            folder / "tuned.json",
            {
                "schema_version": SCHEMA_VERSION,
                "identity": identity,
                "plan_hash": found.plan.hash,
                "share": found.share,
                "tries": [list(turn) for turn in found.tries],
                **self.size(pruned, folder / "onnx"),
                "importance_kept": found.plan.info["importance_kept"],
                "removed_blocks": sorted(found.plan.removed),
                "widths": {d.name: [found.plan.width(d.name, d.size), d.size] for d in self.space.dimensions},
            },
        )
        self.console.print(f"{method} at {share:g}: measured {found.share:.4f} of dense after {len(found.tries)} tries")
        return folder

    def cut(self, plan: PruningPlan, folder: Path) -> torch.nn.Module:
        """The pruned model of a plan, exported."""
        pruned = apply_plan(self.adapter.build(self.checkpoint)[0], plan)
        self.adapter.export(pruned, folder / "onnx", plan_hash=plan.hash, weights=self.weights)
        return pruned

    def size(self, model: torch.nn.Module, folder: Path) -> dict[str, int]:
        """Parameters that are deployed, and multiply-accumulates per frame."""
        unused = self.adapter.training_only
        return {
            "params": sum(p.numel() for n, p in model.named_parameters() if not n.startswith(unused)),
            "macs": sum(count_macs(path) for path in frame_engine_files(folder, self.adapter.once)),
        }

    def side_by_side(self, folders: Mapping[str, Path]) -> dict[str, LatencyStats]:
        """Latencies of deployments in turns."""
        return measure_models(
            folders, self.frames, self.settings.rounds, Progress(console=self.console, transient=True)
        )

    def share(self, folder: Path) -> float:
        """Latency of a plan relative to the dense model, each in turn; median of `SESSIONS`.

        Only the two take turns: more networks would push each other out of the cache.
        """
        found = []
        for _ in range(SESSIONS):
            ratio, dense_ms = self.against_dense(folder)
            self.dense_ms.append(dense_ms)
            found.append(ratio)
        return statistics.median(found)

    def against_dense(self, folder: Path) -> tuple[float, float]:
        """Latency relative to the dense model beside it, and that of the dense model, ms."""
        stats = self.side_by_side({"dense": self.work_dir / "onnx" / "dense", "pruned": folder / "onnx"})
        return stats["pruned"].settled_ms / stats["dense"].settled_ms, stats["dense"].settled_ms
