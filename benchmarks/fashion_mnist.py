"""Pruning of a network that was trained on Fashion-MNIST: accuracy at equal measured latency, method by method.

Every method's plan takes the wanted share of the measured dense latency, is cut, repaired and fine-tuned alike:

    python benchmarks/fashion_mnist.py configs/fashion_mnist/resnet_mdp.py --checkpoint W --seeds 0 1 2 --json F

``mdp_loss`` is MDP as tools/prune.py runs it, ``mdp_taylor`` with the values of the paper; ``channels``, ``linear`` and
``channels_linear`` are its ablation (Taylor values without block removal, with latencies linear in a width, both).
A run that was stopped goes on: what is finished is kept.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fashion_plans import Comparison
from mmengine.config import Config
from mmengine.logging import MMLogger
from rich.console import Console
from torch import nn

from mdp_mmdet3d import __version__
from mdp_mmdet3d.compare import tuning
from mdp_mmdet3d.compare.torch_pruning import torch_pruning_plan
from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.errors import InfeasibleBudgetError, MdpError
from mdp_mmdet3d.files import digest, read_json, write_json
from mdp_mmdet3d.runner.loss_search import find_loss_search
from mdp_mmdet3d.runner.optimise import PlanSearch
from mdp_mmdet3d.runner.outputs import save_pruned_checkpoint
from mdp_mmdet3d.runner.recovery import evaluate, finetune, model_identity
from mdp_mmdet3d.runner.repairing import repair_identity, repair_model
from mdp_mmdet3d.runner.settings import FinetuneSettings, PruneSettings
from mdp_mmdet3d.runner.steps import TABLE_FILE
from mdp_mmdet3d.runtime.measure import session_device
from mdp_mmdet3d.solver import SolveOptions, solve
from mdp_mmdet3d.solver.ablation import channels_only, linear_latency, with_all_blocks
from mdp_mmdet3d.solver.build import LATENCY, Ranking, build_problem, kept_elements
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.plan import PruningPlan

SCHEMA_VERSION = 1
METHODS = ("mdp_loss", "mdp_taylor", "halp", "uniform", "torch_pruning")
ABLATION = ("channels", "linear", "channels_linear")
FIGURE = "top1"
CLOSE, TRIES = 0.03, 5  # an image takes half a millisecond: nothing nearer can be told apart


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="e.g. configs/fashion_mnist/resnet_mdp.py")
    parser.add_argument("--checkpoint", required=True, help="the dense network, trained with tools/train.py")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/fashion_mnist"))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.5, 0.3], help="of the dense latency")
    parser.add_argument("--methods", nargs="+", choices=METHODS + ABLATION, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of fine-tuning")
    parser.add_argument("--iterations", type=int, help="of fine-tuning; default: the config's, one epoch")
    parser.add_argument("--json", type=Path, help="write the result here too")
    return parser.parse_args()


class Images(Comparison):
    """The comparison's steps, with MDP by loss values and its ablation among the methods."""

    def prepare(self) -> None:
        """What all methods start from; the loss values too, once they are asked for."""
        super().prepare()
        self.loss = None

    def propose(self, method: str) -> tuning.Propose:
        """The method as a function of its knob."""
        if method == "mdp_loss":
            return self._by_loss()
        if method in ABLATION:
            return self._ablated(method)
        if method == "torch_pruning":
            return lambda knob: self._by_library(1.0 - knob)
        return super().propose("mdp" if method == "mdp_taylor" else method)

    def _by_loss(self) -> tuning.Propose:
        if self.settings.loss_values is None:
            raise MdpError("mdp_loss needs values in units of loss: prune.importance = 'loss' in the config")
        loss = find_loss_search(
            self.adapter, self.dense, self.space, self.importance, self.weights, self.settings.loss_values,
            self.work_dir, self.console.print,
        )  # fmt: skip
        if self.settings.repairing is not None:
            loss.repaired = lambda plan: self.repaired(plan, self.work_dir / "candidates" / plan.hash)
            loss.repaired_as = digest(self.settings.repairing.identity)
        search = PlanSearch(
            self.space, self.importance, self.latency, self.backend, self.work_dir / TABLE_FILE, 0.0,
            self.settings.time_limit_s, self.console.print,
        )  # fmt: skip

        def mdp(knob: float) -> PruningPlan:
            search.budget_ms = knob * self.reference_ms
            plan = loss.solve(search)
            kept = search.solution.result.objective / search.solution.problem.dense.value
            info = {**plan.info, "method": "mdp_loss", "importance_kept": kept, "loss": loss.report}
            return replace(plan, info=info)

        return mdp

    def _by_library(self, ratio: float) -> PruningPlan:
        multiple = self.settings.channel_multiple
        plan = torch_pruning_plan(self.adapter, self.dense, self.space, ratio, multiple)
        return replace(plan, info={**plan.info, "method": "torch_pruning", "importance_kept": None})

    def _ablated(self, method: str) -> tuning.Propose:
        ranking = Ranking.by_importance(self.space, self.importance)
        whole = build_problem(self.space, self.importance, self.latency, ranking)
        problem = channels_only(whole) if "channels" in method else whole
        if "linear" in method:
            problem = linear_latency(problem, problem.dense_plan)

        def ablated(knob: float) -> PruningPlan:
            # What costs add up to under this model of latency differs from the reference: the knob is a share of it.
            budget = knob * problem.dense.costs[LATENCY]
            found = solve(problem, {LATENCY: budget}, SolveOptions(time_limit_s=self.settings.time_limit_s))
            if found.plan is None:
                raise InfeasibleBudgetError(f"{method}: {found.status.value}", budget)
            indices = with_all_blocks(whole, found.plan) if "channels" in method else found.plan
            kept, removed = kept_elements(self.space, ranking, indices)
            value = whole.evaluate(indices).value / whole.dense.value
            return PruningPlan.from_kept(self.space, kept, removed, {"method": method, "importance_kept": value})

        return ablated

    def repaired(self, plan: PruningPlan, folder: Path) -> nn.Module:
        """The pruned model of a plan, refitted; finished layers are kept in the folder."""
        model = apply_plan(self.adapter.build(self.checkpoint)[0], plan)
        repair_model(
            self.adapter, self.dense, model, plan, self.weights, self.settings.repairing, folder, self.console,
            self.console.print,
        )  # fmt: skip
        return model

    def accuracy(self, plan_folder: Path | None, seeds: Sequence[int], iterations: int | None) -> dict[str, Any]:
        """Top-1 in %: after the cut, after repair, after fine-tuning by seed; of the dense network without a folder."""
        tuned = self.settings.finetuning
        if tuned is None or self.settings.repairing is None:
            raise MdpError("the config must hold prune.finetune and not switch off prune.repair")
        tuned = replace(tuned, iterations=iterations or tuned.iterations)
        folder = plan_folder or self.work_dir / "dense"
        plan = None if plan_folder is None else PruningPlan.load(plan_folder / "plan.json")
        identity = model_identity(self.config, self.weights, plan.hash if plan else None)
        if plan is None:
            config, start = self.config, Path(self.checkpoint)
            out = {"dense": self._top1(config, self.dense, folder / "dense.json", identity)}
        else:
            config, start = read_config(folder / "pruned_config.py"), folder / "repaired.pth"
            cut = apply_plan(self.adapter.build(self.checkpoint)[0], plan)
            out = {"cut": self._top1(config, cut, folder / "cut.json", identity)}
            fitted = self.repaired(plan, folder)
            identity["repair"] = repair_identity(self.adapter, plan, self.weights, self.settings.repairing)
            out["repaired"] = self._top1(config, fitted, folder / "repaired.json", identity)
            save_pruned_checkpoint(start, fitted, plan, self.weights, self.adapter.class_names)
        runs = [self._finetuned(config, start, folder, replace(tuned, seed=seed), identity) for seed in seeds]
        return {**out, "finetuned": runs}

    def _finetuned(
        self, config: Config, start: Path, folder: Path, settings: FinetuneSettings, identity: Mapping[str, Any]
    ) -> float:
        name = f"finetuned_{settings.iterations}_seed{settings.seed}"
        path = finetune(config, start, folder / name, settings, identity, self.console)
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        identity = {**identity, "finetune": asdict(settings)}
        return evaluate(config, state, folder / f"{name}.json", identity, self.console, (FIGURE,))["figures"][FIGURE]

    def _top1(self, config: Config, model: nn.Module, path: Path, identity: Mapping[str, Any]) -> float:
        figures = evaluate(config, model.state_dict(), path, identity, self.console, (FIGURE,))["figures"]
        return figures[FIGURE]


def table(report: Mapping[str, Any]) -> str:
    """Markdown of the figures."""

    def tuned(runs: Sequence[float]) -> str:
        if len(runs) < 2:
            return f"{runs[0]:.2f}" if runs else "-"
        return f"{statistics.mean(runs):.2f} ± {statistics.stdev(runs):.2f}"

    dense = report["dense"]
    lines = [
        "| share | method | measured share | parameters | blocks removed | cut | repaired | fine-tuned |",
        "|---|---|---|---|---|---|---|---|",
        f"| 1 | dense | 1 | {dense['params']:,} | 0 | {dense['dense']:.2f} | - | {tuned(dense['finetuned'])} |",
    ]
    for item in report["plans"]:
        lines.append(
            f"| {item['share']:g} | {item['method']} | {item['measured_share']:.3f} | {item['params']:,} | "
            f"{len(item['removed_blocks'])} | {item['cut']:.2f} | {item['repaired']:.2f} | {tuned(item['finetuned'])} |"
        )
    return "\n".join(lines) + "\n"


def compare(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything; the report is written after every plan."""
    tuning.CLOSE, tuning.TRIES = CLOSE, TRIES
    config = read_config(args.config)
    settings = PruneSettings.from_config(config.get("prune", {}))
    torch.set_num_threads(1)
    job = Images(config, settings, args.work_dir, args.checkpoint, console)
    job.prepare()
    score = partial(job.accuracy, seeds=args.seeds, iterations=args.iterations)
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "torch": torch.__version__,
        "device": asdict(session_device()),
        "config": args.config,
        "weights": job.weights,
        "dense_ms": job.reference_ms,
        "iterations": args.iterations or (settings.finetuning and settings.finetuning.iterations),
        "seeds": args.seeds,
        "plans": [],
    }
    report["dense"] = {**job.size(job.dense, args.work_dir / "onnx" / "dense"), **score(None)}
    for share in args.shares:
        for method in args.methods:
            try:
                folder = job.plan(method, share)
            except MdpError as error:
                console.print(f"{method} at {share:g}: {error}", highlight=False, markup=False)
                continue
            facts = read_json(folder / "tuned.json", what="tuned plan", schema_version=SCHEMA_VERSION)
            entry = {"method": method, "measured_share": facts.pop("share"), **facts, "share": share, **score(folder)}
            for key in ("identity", "schema_version"):
                entry.pop(key)
            report["plans"].append(entry)
            for path in filter(None, (args.work_dir / "fashion_mnist.json", args.json)):
                write_json(path, report)
            console.print(
                f"{method} at {share:g}: cut {entry['cut']:.2f}, repaired {entry['repaired']:.2f}, fine-tuned "
                f"{entry['finetuned']}",
                highlight=False,
                markup=False,
            )
    return report


def main() -> int:
    args = parse_args()
    console = Console(soft_wrap=True)
    MMLogger.get_instance("mdp", log_level="WARNING")
    try:
        report = compare(args, console)
    except MdpError as error:
        console.print(f"[bold red]error:[/bold red] {error}", highlight=False)
        return 2
    console.print(table(report), highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
