"""The comparison: what all methods start from, a plan per method and budget, accuracy before and after training."""

from __future__ import annotations

import copy
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from rich.console import Console
from torch import nn

from mdp_mmdet3d import __version__
from mdp_mmdet3d.adapters import adapter_of
from mdp_mmdet3d.compare.checks import (
    SCHEMA_VERSION,
    TUNED_FILE,
    check_config,
    check_cores,
    different_budgets,
    tuned_plan,
)
from mdp_mmdet3d.compare.methods import METHODS, Material, check_methods, labelled
from mdp_mmdet3d.compare.report import summary, verdicts
from mdp_mmdet3d.compare.steps import Steps
from mdp_mmdet3d.compare.time_left import TimeLeft
from mdp_mmdet3d.compare.tuning import CLOSE, NoPlanError, tune
from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import digest, write_json
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.latency.backends.onnxruntime import OnnxRuntimeBackend
from mdp_mmdet3d.latency.backends.staircases import ONNXRUNTIME_CPU
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.predict import LatencyModel
from mdp_mmdet3d.latency.sampling import check_interpolable
from mdp_mmdet3d.onnx.macs import count_macs
from mdp_mmdet3d.progress import step_bar
from mdp_mmdet3d.runner.lock import locks_work_dir
from mdp_mmdet3d.runner.loss_search import LossSearch, find_loss_search
from mdp_mmdet3d.runner.outputs import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    PLAN_FILE,
    RAW_FILE,
    save_pruned_checkpoint,
    write_checkpoint,
    write_pruned_config,
)
from mdp_mmdet3d.runner.recovery import model_identity
from mdp_mmdet3d.runner.repairing import repair_identity, repair_model
from mdp_mmdet3d.runner.settings import FinetuneSettings, PruneSettings, budget_ms
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
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.plan import PruningPlan
from mdp_mmdet3d.surgery.repair import RepairReport

SESSIONS = 3  # of the final measurement of a plan
DENSE_FILE = "dense.pth"


@dataclass
class Comparison:
    """One run of ``tools/compare.py``; a run that was stopped goes on: plans, trainings and evaluations are kept.

    Attributes:
        config_path: MMEngine config with a model, data, a metric and, for fine-tuning, an optimizer.
        checkpoint: Dense weights.
        methods: Names in `METHODS`.
        budgets: As for ``prune.budget``.
        work_dir: Where everything is written.
        finetune: How to fine-tune every plan and the dense model; None not to.
        seeds: Of fine-tuning.
        cores: The first one measures; all evaluate and train afterwards.
        close: How near to the budget, relative to it, ends the search for a method's plan.
        console: Says what is done.
    """

    config_path: str
    checkpoint: str | None
    methods: list[str]
    budgets: list[str]
    work_dir: Path
    finetune: FinetuneSettings | None = None
    seeds: tuple[int, ...] = (0,)
    cores: tuple[int, ...] = ()
    close: float = CLOSE
    console: Console = field(default_factory=Console)

    def __post_init__(self) -> None:
        self.config: Config = read_config(self.config_path)
        self.settings = PruneSettings.from_config(self.config.get("prune", {}))
        check_methods(self.methods)
        self.budgets = different_budgets(self.budgets)
        check_cores(self.cores)
        if not 0 < self.close < 1:
            raise MdpError(f"--close: {self.close:g} is no share of the budget; give one between 0 and 1, such as 0.03")
        for seed in self.seeds if self.finetune is not None else ():
            FinetuneSettings.from_config({**vars(self.finetune), "seed": seed})
        self.checkpoint = self.checkpoint or self.config.get("checkpoint")
        check_config(self.config, self.config_path, self.checkpoint, self.finetune)

    @locks_work_dir
    def run(self) -> dict[str, Any]:
        """Compare; returns the report (`summary` of accuracies, latencies, sizes per budget and method)."""
        start = time.perf_counter()
        cores = self.cores or tuple(sorted(os.sched_getaffinity(0)))
        with _alone(cores[0]):
            self._prepare()
            names = self._plans()
            shutil.rmtree(self.work_dir / "candidates", ignore_errors=True)
        steps = Steps(
            self.work_dir / "steps",
            self.config_path,
            str(self.work_dir / DENSE_FILE),
            self.weights,
            self.finetune,
            self.adapter.headline,
            self.console,
        )
        results = {"dense": self._accuracies(steps, "dense", None)}
        for name in names.values():
            results[name] = self._accuracies(steps, name, self.work_dir / "plans" / name)
        steps.run(cores)
        report = self._report(names, results)
        return {**report, "seconds_of_this_run": time.perf_counter() - start, "verdicts": verdicts(report)}

    def _say(self, line: str) -> None:
        self.console.print(f"  {line}", highlight=False, markup=False)

    def _prepare(self) -> None:
        """Space, importance, latency table, whole networks: what all methods start from, reused if it is there."""
        settings, folder, say = self.settings, self.work_dir, self._say
        folder.mkdir(parents=True, exist_ok=True)
        self.adapter = adapter = adapter_of(self.config, settings.input_shape, settings.adapter)
        self.dense, self.weights = adapter.build(self.checkpoint)
        self.frames = adapter.frames(self.dense, MEASURED_FRAMES)
        self.console.print("what all methods start from", style="bold")
        space = find_space(adapter, self.dense, settings, folder / "space.json", say)
        check_interpolable(space, ONNXRUNTIME_CPU)
        write_checkpoint(folder / DENSE_FILE, {"meta": {}, "state_dict": self.dense.state_dict()})
        importance = find_importance(
            adapter, self.dense, space, self.weights, settings.frames, folder / "importance.npz", say
        )
        loss = self._loss_search(space, importance) if "mdp" in self.methods else None
        export_model(adapter, self.dense, folder / "onnx" / "dense", None, self.weights, say)
        networks = find_networks(adapter, self.dense, space, settings, folder, self.weights, self._measure, say)
        backend = OnnxRuntimeBackend()
        table = measure_latency(space, backend, folder / TABLE_FILE, policy=settings.sampling)
        latency = LatencyModel.fit(space, table, networks)
        for line in (*latency.explanation, *(f"warning: {doubt}" for doubt in latency.doubts)):
            say(line)
        self.dense_ms: list[float] = [sum(networks[0].engines_ms.values())]
        self.material = Material(
            adapter=adapter,
            dense=self.dense,
            weights=self.weights,
            space=space,
            importance=importance,
            latency=latency,
            backend=backend,
            table_path=folder / TABLE_FILE,
            reference_ms=self.dense_ms[0],
            time_limit_s=settings.time_limit_s,
            loss=loss,
            channel_multiple=settings.channel_multiple,
            say=say,
        )

    def _loss_search(self, space: PruningSpace, importance: ImportanceTable) -> LossSearch | None:
        """Values in units of loss where the config asks for them, and a choice of repaired plans where it repairs."""
        if self.settings.loss_values is None:
            return None
        search = find_loss_search(
            self.adapter,
            self.dense,
            space,
            importance,
            self.weights,
            self.settings.loss_values,
            self.work_dir,
            self._say,
        )
        if self.settings.repairing is not None:
            search.repaired, search.repaired_as = self._repaired, digest(self.settings.repairing.identity)
        return search

    def _repaired(self, plan: PruningPlan) -> nn.Module:
        """The repaired model of a plan that may be chosen."""
        model = apply_plan(self.adapter.build(self.checkpoint)[0], plan)
        folder = self.work_dir / "candidates" / plan.hash
        self._repair(model, plan, folder)
        return model

    def _repair(self, model: nn.Module, plan: PruningPlan, folder: Path) -> RepairReport | None:
        """Refit in place, where the config repairs."""
        settings = self.settings.repairing
        return repair_model(
            self.adapter, self.dense, model, plan, self.weights, settings, folder, self.console, self._say
        )

    def _plans(self) -> dict[tuple[str, str], str]:
        """Find all plans; the folder's name of each budget and method that has one."""
        self.without_plan: dict[str, dict[str, str]] = {}
        names = {(budget, method): f"{method}_{budget}" for budget in self.budgets for method in self.methods}
        left = TimeLeft()
        for _ in names:
            left.add("plan")
        for (budget, method), name in names.items():
            start = time.perf_counter()
            self.console.print(f"{METHODS[method].title} at {budget}", style="bold")
            try:
                found = f"measured {self._plan(name, method, budget):.3f} of dense"
            except NoPlanError as error:
                found = self.without_plan.setdefault(budget, {})[method] = str(error)
            left.end("plan", time.perf_counter() - start)
            self._say(f"{found}; plan {left.ended} of {left.total}{left.sentence()}")
        return {key: name for key, name in names.items() if key[1] not in self.without_plan.get(key[0], {})}

    def _plan(self, name: str, method: str, budget: str) -> float:
        """Find the plan of a method unless an earlier run did; returns its measured share of the dense latency."""
        folder, material = self.work_dir / "plans" / name, self.material
        repairing = self.settings.repairing
        identity = {
            "method": [method, METHODS[method].version],
            "budget": budget,
            "weights": self.weights,
            "space": material.space.hash,
            "values": str(self.settings.importance) if method == "mdp" else None,
            "importance": [material.importance.data, self.settings.frames],
            "repair": None if repairing is None else repairing.identity,
            "device": asdict(session_device()),
            **({} if self.close == CLOSE else {"close": self.close}),
        }
        if (folder / TUNED_FILE).is_file():
            kept = tuned_plan(folder)
            if kept["identity"] == identity:
                self._say("reused")
                self.dense_ms += kept["dense_ms"]
                return kept["measured_share"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TUNED_FILE).unlink(missing_ok=True)  # until everything is there again

        def measure(plan: PruningPlan) -> float:
            self._cut(plan, folder)
            found = self._against_dense(folder)[0]
            self._say(f"a plan with {found:.3f} of the dense latency")
            return found

        wanted = budget_ms(budget, material.reference_ms) / material.reference_ms
        found = tune(labelled(METHODS[method].start(material), method), measure, wanted, self.close)
        pruned = self._cut(found.plan, folder)
        raw = copy.deepcopy(pruned)
        save = partial(
            save_pruned_checkpoint, plan=found.plan, weights=self.weights, class_names=self.adapter.class_names
        )
        found.plan.save(folder / PLAN_FILE)
        save(folder / RAW_FILE, raw)
        report = self._repair(pruned, found.plan, folder)
        save(folder / CHECKPOINT_FILE, pruned)
        write_pruned_config(folder / CONFIG_FILE, self.config)
        sessions = [self._against_dense(folder) for _ in range(SESSIONS)]
        share, dense_ms = statistics.median(s for s, _ in sessions), [ms for _, ms in sessions]
        self.dense_ms += dense_ms
        write_json(
            folder / TUNED_FILE,
            {
                "schema_version": SCHEMA_VERSION,
                "identity": identity,
                "plan_hash": found.plan.hash,
                "wanted_share": wanted,
                "measured_share": share,
                "dense_ms": dense_ms,
                "tries": [list(turn) for turn in found.tries],
                **self._size(pruned, folder / "onnx"),
                "refitted": None if report is None else report.summary()["refitted"],
                "removed_blocks": sorted(found.plan.removed),
                "widths": {d.name: [found.plan.width(d.name, d.size), d.size] for d in material.space.dimensions},
            },
        )
        return share

    def _cut(self, plan: PruningPlan, folder: Path) -> nn.Module:
        """The pruned model of a plan, exported."""
        pruned = apply_plan(self.adapter.build(self.checkpoint)[0], plan)
        self.adapter.export(pruned, folder / "onnx", plan_hash=plan.hash, weights=self.weights)
        return pruned

    def _size(self, model: nn.Module, folder: Path) -> dict[str, int]:
        """Parameters that are deployed, and multiply-accumulates per frame."""
        unused = self.adapter.training_only
        return {
            "params": sum(p.numel() for n, p in model.named_parameters() if not n.startswith(unused)),
            "macs": sum(count_macs(path) for path in frame_engine_files(folder, self.adapter.once)),
        }

    def _measure(self, folders: Mapping[str, Path]) -> dict[str, LatencyStats]:
        return measure_models(folders, self.frames, self.settings.rounds, step_bar(self.console))

    def _against_dense(self, folder: Path) -> tuple[float, float]:
        """Latency relative to the dense model beside it, and that of the dense model, ms."""
        stats = self._measure({"dense": self.work_dir / "onnx" / "dense", "pruned": folder / "onnx"})
        return stats["pruned"].settled_ms / stats["dense"].settled_ms, stats["dense"].settled_ms

    def _accuracies(self, steps: Steps, name: str, plan: Path | None) -> dict[str, list[Path]]:
        """Results to be: as cut, repaired where the config repairs, fine-tuned where asked for."""
        found, more = {}, None
        repairing = self.settings.repairing
        if plan is None:
            found["cut"] = [steps.add(name, None)]
        else:
            found["cut"] = [steps.add(f"{name}_cut", plan, checkpoint=RAW_FILE)]
            if repairing is not None:
                kept = PruningPlan.load(plan / PLAN_FILE)
                more = {"repair": repair_identity(self.adapter, kept, self.weights, repairing)}
                found["repaired"] = [steps.add(f"{name}_repaired", plan, more=more)]
        if self.finetune is not None:
            found["finetuned"] = [steps.add(f"{name}_seed{seed}", plan, seed, more=more) for seed in self.seeds]
        return found

    def _report(
        self, names: Mapping[tuple[str, str], str], results: Mapping[str, Mapping[str, Sequence[Path]]]
    ) -> dict[str, Any]:
        dense_ms = statistics.median(self.dense_ms)

        def entry(name: str) -> dict[str, Any]:
            figures = {key: summary(paths) for key, paths in results[name].items()}
            if name == "dense":
                size = self._size(self.dense, self.work_dir / "onnx" / "dense")
                return {"latency_ms": dense_ms, "measured_share": 1.0, **size, **figures}
            kept = tuned_plan(self.work_dir / "plans" / name)
            kept = {key: value for key, value in kept.items() if key not in ("schema_version", "identity", "dense_ms")}
            return {"latency_ms": kept["measured_share"] * dense_ms, **kept, **figures}

        dense = entry("dense")
        return {
            "schema_version": SCHEMA_VERSION,
            "version": __version__,
            "torch": torch.__version__,
            "device": asdict(session_device()),
            "config": self.config_path,
            "weights": self.weights,
            "data": model_identity(self.config, self.weights, None)["data"],
            "figures": list(dense["cut"]),
            "importance_frames": self.material.importance.batches,
            "finetune": None if self.finetune is None else {**asdict(self.finetune), "seeds": list(self.seeds)},
            "rounds": self.settings.rounds,
            "dense": dense,
            "budgets": {
                budget: {m: entry(names[budget, m]) for m in self.methods if (budget, m) in names}
                for budget in self.budgets
            },
            "without_plan": self.without_plan,
        }


@contextmanager
def _alone(core: int) -> Iterator[None]:
    """Measure on one core with one thread; afterwards all is as it was."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
