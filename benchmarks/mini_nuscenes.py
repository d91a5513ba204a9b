"""MDP, HALP and uniform pruning of the small StreamPETR: accuracy at equal measured latency.

Every method's own knob (internal budget, ratio) is turned until its plan, exported and measured beside the dense model,
takes the wanted share of the dense latency. Each plan is evaluated, fine-tuned with several seeds by equal recipe, and
evaluated again; so is the dense model. A run that was stopped goes on: plans, trainings and evaluations are kept.

    python benchmarks/mini_nuscenes.py --json docs/results/mini_nuscenes.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from mini_steps import Steps
from mmengine.config import Config
from mmengine.logging import MMLogger
from rich.console import Console
from rich.progress import Progress

from mdp_mmdet3d import __version__
from mdp_mmdet3d.adapters import adapter_of
from mdp_mmdet3d.compare.tuning import Propose, tune
from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.errors import InfeasibleBudgetError, MdpError
from mdp_mmdet3d.files import read_json, write_json
from mdp_mmdet3d.latency.backends.onnxruntime import OnnxRuntimeBackend
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.predict import LatencyModel
from mdp_mmdet3d.onnx.macs import count_macs
from mdp_mmdet3d.runner.optimise import PlanSearch
from mdp_mmdet3d.runner.outputs import save_pruned_checkpoint, write_pruned_config
from mdp_mmdet3d.runner.recovery import model_identity
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
FIGURES = ("mAP", "NDS")
METHODS = ("mdp", "halp", "uniform")
SESSIONS = 3  # of the final measurement
HALP_STEPS = 4  # of HALP's schedule


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="configs/streampetr_mini_mdp.py")
    parser.add_argument("--checkpoint", help="default: the config's")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/mini_nuscenes"))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.55, 0.4], help="of the dense latency")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, help="of fine-tuning; default: the config's prune.finetune")
    parser.add_argument(
        "--cores",
        type=int,
        nargs="+",
        default=sorted(os.sched_getaffinity(0)),
        help="the first one measures; all others train meanwhile, and the first one too afterwards",
    )
    parser.add_argument("--json", type=Path, help="write the result here too")
    return parser.parse_args()


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


def summary(results: Sequence[Path]) -> dict[str, Any]:
    """Figures of runs that differ in their seed: each, mean, standard deviation, spread (largest - smallest)."""
    content = [read_json(path, what="accuracy", schema_version=SCHEMA_VERSION) for path in results]
    out: dict[str, Any] = {}
    for figure in FIGURES:
        values = [item["figures"][figure] for item in content]
        out[figure] = {
            "runs": values,
            "mean": statistics.mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "spread": max(values) - min(values),
        }
    return out


def verdicts(report: Mapping[str, Any]) -> dict[str, Any]:
    """What was expected: MDP ahead of HALP at every share; at the largest share not below dense by more than spread."""
    dense = report["dense"]["finetuned"]["mAP"]
    out: dict[str, Any] = {}
    for share, methods in report["shares"].items():
        mdp = methods["mdp"]["finetuned"]["mAP"]
        out[share] = {
            f"mdp_minus_{name}": mdp["mean"] - methods[name]["finetuned"]["mAP"]["mean"]
            for name in methods
            if name != "mdp"
        }
        out[share]["mdp_minus_dense"] = mdp["mean"] - dense["mean"]
        out[share]["spread"] = max(mdp["spread"], dense["spread"])
        out[share]["not_below_dense_by_more_than_the_spread"] = out[share]["mdp_minus_dense"] >= -out[share]["spread"]
    return out


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Markdown, to be pasted."""
    console.print(
        "| share | method | latency ms | measured share | params M | importance kept | mAP cut | NDS cut | "
        "mAP fine-tuned | NDS fine-tuned |\n|---|---|---|---|---|---|---|---|---|---|",
        soft_wrap=True,
    )

    def row(share: str, name: str, item: Mapping[str, Any]) -> None:
        tuned = " | ".join(f"{item['finetuned'][f]['mean']:.3f} ± {item['finetuned'][f]['std']:.3f}" for f in FIGURES)
        console.print(
            f"| {share} | {name} | {item['latency_ms']:.2f} | {item['measured_share']:.3f} | "
            f"{item['params'] / 1e6:.2f} | {item['importance_kept']:.3f} | {item['before']['mAP']['mean']:.3f} | "
            f"{item['before']['NDS']['mean']:.3f} | {tuned} |",
            soft_wrap=True,
            highlight=False,
        )

    row("1", "dense", report["dense"])
    for share, methods in report["shares"].items():
        for name, item in methods.items():
            row(share, name, item)
    for share, verdict in report["verdicts"].items():
        console.print(
            f"{share}: "
            + ", ".join(f"{k} {v if isinstance(v, bool) else format(v, '+.3f')}" for k, v in verdict.items()),
            soft_wrap=True,
            highlight=False,
        )


def compare(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything; returns the report."""
    start = time.perf_counter()
    config = read_config(args.config)
    settings = PruneSettings.from_config(config.get("prune", {}))
    checkpoint = args.checkpoint or config.get("checkpoint")
    if settings.finetuning is None or not checkpoint:
        raise MdpError(
            f"{args.config} must name a checkpoint and hold prune.finetune, as configs/streampetr_mini_mdp.py does"
        )
    tuning = replace(settings.finetuning, iterations=args.iterations or settings.finetuning.iterations)
    os.sched_setaffinity(0, {args.cores[0]})
    torch.set_num_threads(1)
    job = Comparison(config, settings, args.work_dir, checkpoint, console)
    job.prepare()
    steps = Steps(args.work_dir / "steps", args.config, checkpoint, job.weights, tuning, console)
    for core in args.cores[1:]:
        steps.work_on(core)

    results: dict[str, dict[str, list[Path]]] = {}

    def add(name: str, plan: Path | None) -> None:
        results[name] = {
            "before": [steps.add(f"{name}_cut" if plan else name, plan, None)],
            "finetuned": [steps.add(f"{name}_seed{seed}", plan, seed) for seed in args.seeds],
        }

    add("dense", None)
    for share in args.shares:
        for method in METHODS:
            add(f"{method}_{share:g}", job.plan(method, share))
    steps.work_on(args.cores[0])
    steps.finish()
    shares = {name: 1.0 if name == "dense" else job.share(job.work_dir / "plans" / name) for name in results}
    dense_ms = statistics.median(job.dense_ms)

    def entry(name: str) -> dict[str, Any]:
        figures = {key: summary(paths) for key, paths in results[name].items()}
        latency = {"latency_ms": shares[name] * dense_ms, "measured_share": shares[name]}
        if name == "dense":
            size = {
                **job.size(job.dense, job.work_dir / "onnx" / "dense"),
                "importance_kept": 1.0,
            }
        else:
            size = read_json(
                job.work_dir / "plans" / name / "tuned.json", what="tuned plan", schema_version=SCHEMA_VERSION
            )
            size = {key: value for key, value in size.items() if key not in ("schema_version", "identity")}
        return {**latency, **size, **figures}

    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "torch": torch.__version__,
        "device": asdict(session_device()),
        "config": args.config,
        "weights": job.weights,
        "data": model_identity(config, job.weights, None)["data"],
        "importance_frames": job.importance.batches,
        "finetune": {**asdict(tuning), "seeds": args.seeds},
        "rounds": settings.rounds,
        "dense": entry("dense"),
        "shares": {f"{share:g}": {method: entry(f"{method}_{share:g}") for method in METHODS} for share in args.shares},
        "training_core_seconds": sum(
            read_json(path, what="fine-tuning", schema_version=SCHEMA_VERSION)["seconds"]
            for path in (args.work_dir / "steps").glob("*/training/finetune.json")
        ),
        "seconds_of_this_run": time.perf_counter() - start,
    }
    return {**report, "verdicts": verdicts(report)}


def main() -> int:
    args = parse_args()
    console = Console(soft_wrap=True)
    MMLogger.get_instance("mdp", log_level="WARNING")
    try:
        report = compare(args, console)
    except MdpError as error:
        console.print(f"[bold red]error:[/bold red] {error}", highlight=False)
        return 2
    for path in filter(None, (args.work_dir / "mini_nuscenes.json", args.json)):
        write_json(path, report)
    print_report(report, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
