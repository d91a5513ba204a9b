"""The pruning job: every step of the line, in order, each reusing what an earlier run left in the work directory."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from rich.console import Console
from torch import nn

from mdp_mmdet3d.adapters import RANDOM, Adapter, adapter_of
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import digest, write_json
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.latency.backends.onnxruntime import OnnxRuntimeBackend
from mdp_mmdet3d.latency.backends.staircases import ONNXRUNTIME_CPU
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.predict import LatencyModel
from mdp_mmdet3d.latency.sampling import check_interpolable
from mdp_mmdet3d.latency.table import LatencyTable
from mdp_mmdet3d.onnx.folders import check_target
from mdp_mmdet3d.progress import step_bar
from mdp_mmdet3d.report.html import write_html
from mdp_mmdet3d.report.provenance import provenance
from mdp_mmdet3d.report.structure import plot_structure
from mdp_mmdet3d.report.summary import decimals
from mdp_mmdet3d.runner.correction import load_correction, save_correction, search_identity
from mdp_mmdet3d.runner.finetune_length import finetuning_of
from mdp_mmdet3d.runner.lock import locks_work_dir
from mdp_mmdet3d.runner.loss_search import LossSearch, find_loss_search
from mdp_mmdet3d.runner.optimise import PlanSearch
from mdp_mmdet3d.runner.outcome import Pruned, Steps, job_report
from mdp_mmdet3d.runner.outputs import RAW_FILE, check_not_its_own, new_pruned_model, save_pruned_checkpoint
from mdp_mmdet3d.runner.recovery import check_trainable, recover
from mdp_mmdet3d.runner.repairing import FOLDER as REPAIR
from mdp_mmdet3d.runner.repairing import repair_identity, repair_model
from mdp_mmdet3d.runner.settings import PruneSettings, budget_ms
from mdp_mmdet3d.runner.steps import (
    MEASURED_FRAMES,
    TABLE_FILE,
    export_model,
    find_importance,
    find_networks,
    find_space,
    measure_models,
)
from mdp_mmdet3d.runner.target import load_target_table, table_identity, target_model, target_networks
from mdp_mmdet3d.runtime.measure import LatencyStats
from mdp_mmdet3d.runtime.pyz import RUNTIME_FILE, write_runtime
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.plan import PruningPlan
from mdp_mmdet3d.surgery.repair import RepairReport

CORRECTION_FILE = "calibration.json"
CANDIDATES = "candidates"  # folder of the repaired layers of plans that may be chosen
COMPARED_FRAMES = 3  # frames on which ONNX Runtime is compared with PyTorch


@dataclass
class PruneJob:
    """One run of ``tools/prune.py``.

    Attributes:
        config: MMEngine config with ``model``, ``importance_dataloader`` and ``class_names``.
        settings: Its ``prune`` section with the command line's overrides.
        work_dir: Where everything is written; a second run with another budget reuses importance and latency.
        checkpoint: Dense weights, or None for random ones.
        console: Where progress is printed.
        latency_table: Table to use. One of this device is completed by measuring here as usual; one of another device
            is taken as it is, and nothing that this machine measures counts.
        target_latency: ``fps.json`` of ``tools/validate_fps.py``, run on the device of ``latency_table``.
        command: Command line that started the run, for the report; empty where a program did.
    """

    config: Config
    settings: PruneSettings
    work_dir: Path
    checkpoint: str | None = None
    console: Console = field(default_factory=Console)
    latency_table: Path | None = None
    target_latency: Path | None = None
    command: str = ""

    @locks_work_dir
    def run(self) -> dict[str, Any]:
        """Prune, export, measure; returns what ``report.json`` holds."""
        self.settings.check()
        check_not_its_own(self.config, self.work_dir)
        if self.settings.finetune is not None:  # told now, not after an hour
            check_trainable(self.config)
        self.work_dir.mkdir(parents=True, exist_ok=True)
        steps = Steps(self.console)
        with steps("model"):
            adapter = adapter_of(self.config, self.settings.input_shape, self.settings.adapter)
            dense, weights = adapter.build(self.checkpoint)
            if weights == RANDOM:
                self.console.print(
                    "  [bold red]RANDOM WEIGHTS[/bold red]: no checkpoint was given. The line runs and "
                    "the latencies are real, but which parts stay means nothing. Use --checkpoint."
                )
            frames = adapter.frames(dense, max(MEASURED_FRAMES, COMPARED_FRAMES))
        with steps("pruning space"):
            space = find_space(adapter, dense, self.settings, self.work_dir / "space.json", self._say)
        target = self._target_table(space)
        if target is None:
            check_interpolable(space, ONNXRUNTIME_CPU)
        with steps("importance"):
            importance = find_importance(
                adapter, dense, space, weights, self.settings.frames, self.work_dir / "importance.npz", self._say
            )
        loss = None
        if self.settings.loss_values is not None and weights != RANDOM:
            with steps("loss changes"):
                loss = find_loss_search(
                    adapter, dense, space, importance, weights, self.settings.loss_values, self.work_dir, self._say
                )
            if self.settings.repairing is not None:
                loss.repaired = partial(self._repaired, adapter, dense, weights)
                loss.repaired_as = digest(self.settings.repairing.identity)
        with steps("export dense"):
            export_model(adapter, dense, self.work_dir / "onnx" / "dense", None, weights, self._say)
            self._write_runtime()
        if target is None or self.latency_table is None:
            found = self._prune_here(adapter, space, importance, loss, dense, frames, weights, steps)
        else:
            found = self._prune_for_target(adapter, space, importance, loss, self.latency_table, target, weights, steps)
        repairing = self.settings.repairing
        raw = copy.deepcopy(found.model) if repairing is not None and weights != RANDOM else None
        repaired = self._repair(adapter, dense, found, weights, raw, steps)
        with steps("check"):
            differences = {
                name: adapter.compare(model, self.work_dir / "onnx" / name, frames[:COMPARED_FRAMES])
                for name, model in (("dense", dense), ("pruned", found.model))
            }
            apart = max((value for values in differences.values() for value in values.values()), default=0.0)
            self._say(f"dense and pruned: at most {apart:.1e} apart")
        plot_structure(self.work_dir / "structure.png", space, found.plan)
        recovered = recover(
            self.config,
            self.work_dir,
            headline=adapter.headline,
            evaluate_models=self.settings.evaluate,
            settings=finetuning_of(self.config, self.settings, found.share),
            dense=dense,
            pruned=found.model,
            plan=found.plan,
            weights=weights,
            console=self.console,
            steps=steps,
            raw=raw if repaired else None,
            repair=repair_identity(adapter, found.plan, weights, repairing) if repaired and repairing else None,
        )
        report = {
            **job_report(
                adapter,
                space,
                importance,
                found,
                dense=dense,
                work_dir=self.work_dir,
                budget=self.settings.budget,
                differences=differences,
                weights=weights,
                seconds=steps.seconds,
            ),
            **({"repair": repaired.summary()} if repaired else {}),
            **({"values": {**loss.report, **loss.delivered(found.model)}} if loss else {}),
            **recovered,
        }
        report["provenance"] = provenance(self.command, self.config.filename, self.checkpoint, asdict(self.settings))
        write_json(self.work_dir / "report.json", report)
        with steps("report"):
            write_html(self.work_dir)
        return report

    def _repaired(self, adapter: Adapter, dense: nn.Module, weights: str, plan: PruningPlan) -> nn.Module:
        """The repaired model of a plan that may be chosen; its layers are kept until one is."""
        model = apply_plan(adapter.build(self.checkpoint)[0], plan)
        folder = self.work_dir / CANDIDATES / plan.hash
        repair_model(adapter, dense, model, plan, weights, self.settings.repairing, folder, self.console, self._say)
        return model

    def _repair(
        self,
        adapter: Adapter,
        dense: nn.Module,
        found: Pruned,
        weights: str,
        raw: nn.Module | None,
        steps: Steps,
    ) -> RepairReport | None:
        """Refit the pruned model and write it anew; its structure, and so its latency, stays."""
        settings = self.settings.repairing
        if settings is None:
            return None
        with steps("repair"):
            candidate = self.work_dir / CANDIDATES / found.plan.hash / REPAIR
            if candidate.is_dir():  # repaired already, before it was chosen
                shutil.rmtree(self.work_dir / REPAIR, ignore_errors=True)
                candidate.rename(self.work_dir / REPAIR)
            report = repair_model(
                adapter, dense, found.model, found.plan, weights, settings, self.work_dir, self.console, self._say
            )
            if report is None:
                self._say("skipped: random weights have nothing to be repaired")
            else:
                self._save(adapter, found.model, found.plan, weights, found.search, raw if settings.keep_raw else None)
            shutil.rmtree(self.work_dir / CANDIDATES, ignore_errors=True)
        return report

    def _prune_here(
        self,
        adapter: Adapter,
        space: PruningSpace,
        importance: ImportanceTable,
        loss: LossSearch | None,
        dense: nn.Module,
        frames: list[Any],
        weights: str,
        steps: Steps,
    ) -> Pruned:
        """Measure on this machine, solve, measure the result, and correct until it meets the budget."""
        with steps("whole networks"):
            networks = find_networks(
                adapter, dense, space, self.settings, self.work_dir, weights, partial(self._measure, frames), self._say
            )
        reference_ms = sum(networks[0].engines_ms.values())
        budget = budget_ms(self.settings.budget, reference_ms)
        with steps("latency table"):
            backend = OnnxRuntimeBackend()
            known = (self.work_dir / TABLE_FILE).exists()
            table = measure_latency(space, backend, self.work_dir / TABLE_FILE, policy=self.settings.sampling)
            self._say(f"{len(table)} entries ({TABLE_FILE}{'; those that it had are reused' if known else ''})")
        latency = self._explained(LatencyModel.fit(space, table, networks))
        values = None if loss is None else [asdict(loss.settings), loss.repaired_as]
        identity = search_identity(self.settings, space, importance, networks, values)
        finished = load_correction(self.work_dir / CORRECTION_FILE, identity, latency)
        latency, corrections = finished or (latency, 0)
        search = PlanSearch(
            space,
            importance,
            latency,
            backend,
            self.work_dir / TABLE_FILE,
            budget,
            self.settings.time_limit_s,
            self._say,
            {"latency_device": str(table.device)},
            corrections,
        )
        allowed, digits = self.settings.refinements, decimals(budget)
        for refinement in range(allowed + 1):
            with steps("solve"):
                plan = search.solve() if loss is None else loss.solve(search)
            pruned = self._cut(adapter, plan, weights, search, steps)
            with steps("measure"):
                stats = self._measure(frames, {name: self.work_dir / "onnx" / name for name in ("dense", "pruned")})
            drift = stats["dense"].settled_ms / reference_ms
            measured = stats["pruned"].settled_ms / drift
            deviation = measured / budget - 1
            self.console.print(
                f"  predicted {search.predicted_ms:.{digits}f} ms, measured {measured:.{digits}f} ms, budget "
                f"{budget:.{digits}f} ms: {deviation:+.1%}"
            )
            if finished or abs(deviation) <= self.settings.tolerance or refinement == allowed:
                break
            self._say(f"the prediction is corrected by that and solved again ({refinement + 1} of {allowed} at most)")
            found_ms = stats["pruned"].engines_ms
            search.correct({engine: ms * measured / sum(found_ms.values()) for engine, ms in found_ms.items()})
        save_correction(self.work_dir / CORRECTION_FILE, identity, search.latency, search.corrections)
        return Pruned(search, plan, pruned, stats, drift)

    def _prune_for_target(
        self,
        adapter: Adapter,
        space: PruningSpace,
        importance: ImportanceTable,
        loss: LossSearch | None,
        path: Path,
        table: LatencyTable,
        weights: str,
        steps: Steps,
    ) -> Pruned:
        """Solve on the target's table; what it takes end to end is measured on the target."""
        with steps("latency model of the target"):
            model = self._explained(
                target_model(space, table, target_networks(self.work_dir, space, table, self.target_latency))
            )
            dense_ms = model.predict({})
            self.console.print(
                f"  {len(table)} entries, {len(table.disturbed())} of them measured while something else ran; "
                f"{len(model.networks)} whole networks"
            )
            self.console.print(f"  dense: {dense_ms:.3f} ms predicted on {table.device}")
        search = PlanSearch(
            space,
            importance,
            model,
            None,
            path,
            budget_ms(self.settings.budget, dense_ms),
            self.settings.time_limit_s,
            self._say,
            {"latency_device": str(table.device), "latency_table": table_identity(path, table)},
        )
        with steps("solve"):
            plan = search.solve() if loss is None else loss.solve(search)
        return Pruned(search, plan, self._cut(adapter, plan, weights, search, steps))

    def _target_table(self, space: PruningSpace) -> LatencyTable | None:
        """The given table if it is of another device; one of this device joins the work directory's."""
        if self.latency_table is None:
            for option, given in (
                ("--target-latency", self.target_latency is not None),
                (f"prune.precision {self.settings.precision}", self.settings.precision != "float32"),
            ):
                if given:
                    raise MdpError(
                        f"{option} needs the latency table of the target (--latency-table F): without one, "
                        "latency is measured on this machine with ONNX Runtime in float32"
                    )
            return None
        backend = OnnxRuntimeBackend()
        table = LatencyTable.load(self.latency_table)
        differences = [*table.device.differences(backend.device()), *table.protocol.differences(backend.protocol)]
        if differences:
            table = load_target_table(self.latency_table, space, self.settings.precision)
            self.console.print(
                f"  [bold]target: {table.device}[/bold]; not this machine ({'; '.join(differences)}), so latencies are "
                "predictions from its table and nothing measured here counts",
                highlight=False,
            )
            return table
        if self.target_latency is not None:
            raise MdpError(
                f"--target-latency {self.target_latency}: the latency table {self.latency_table} is of this "
                "machine, which measures whole networks by itself; leave the option out"
            )
        path = self.work_dir / TABLE_FILE
        if path.exists():
            own = LatencyTable.load(path)
            own.merge(table)
            table = own
        table.save(path)
        self.console.print(f"  {self.latency_table} is of this machine: measuring goes on from it", highlight=False)
        return None

    def _say(self, line: str) -> None:
        """Print a line of the step that is running."""
        self.console.print(f"  {line}")

    def _measure(self, frames: list[Any], folders: Mapping[str, Path]) -> dict[str, LatencyStats]:
        return measure_models(folders, frames, self.settings.rounds, step_bar(self.console))

    def _explained(self, model: LatencyModel) -> LatencyModel:
        for line in model.explanation:
            self.console.print(f"  latency model: {line}")
        for doubt in model.doubts:
            self.console.print(f"  warning: {doubt}", style="yellow", markup=False, highlight=False)
        return model

    def _write_runtime(self) -> None:
        """What the device runs to validate the deployments, beside them."""
        try:
            write_runtime(self.work_dir / "onnx" / RUNTIME_FILE)
        except MdpError as error:
            self._say(f"{RUNTIME_FILE} is not written: {error}")

    def _cut(self, adapter: Adapter, plan: PruningPlan, weights: str, search: PlanSearch, steps: Steps) -> nn.Module:
        with steps("cut and export"):
            pruned = apply_plan(adapter.build(self.checkpoint)[0], plan)
            self._save(adapter, pruned, plan, weights, search)
        return pruned

    def _save(
        self,
        adapter: Adapter,
        pruned: nn.Module,
        plan: PruningPlan,
        weights: str,
        search: PlanSearch,
        raw: nn.Module | None = None,
    ) -> None:
        check_target(self.work_dir / "onnx" / "pruned")
        with new_pruned_model(self.work_dir, pruned, plan, weights, self.config, adapter.class_names) as part:
            search.solution.problem.save(part / "problem.npz")
            if raw is not None:
                save_pruned_checkpoint(part / RAW_FILE, raw, plan, weights, adapter.class_names)
            export_model(adapter, pruned, part / "onnx" / "pruned", plan, weights, self._say)
