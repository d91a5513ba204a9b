"""Evaluations and trainings of a comparison: a process per model, one at a time on each core."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from rich.console import Console

from mdp_mmdet3d.compare.time_left import TimeLeft
from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import read_json, write_json
from mdp_mmdet3d.progress import step_bar
from mdp_mmdet3d.runner.outputs import CHECKPOINT_FILE, CONFIG_FILE, PLAN_FILE
from mdp_mmdet3d.runner.recovery import evaluate, finetune, model_identity
from mdp_mmdet3d.runner.settings import FinetuneSettings
from mdp_mmdet3d.surgery.plan import PruningPlan

SCHEMA_VERSION = 1
COMMAND = (sys.executable, "-m", "mdp_mmdet3d.compare.steps")


class Steps:
    """Work to do, and who does it.

    Args:
        folder: Results, one folder per step, and a log per model.
        config_path: The dense config.
        checkpoint: The dense weights.
        weights: Their identity.
        settings: How to fine-tune; the seed is that of the step. None: nothing is fine-tuned.
        headline: Metrics that stand for accuracy, as for `runner.recovery.evaluate`.
        console: Says what ended, and how long the rest will take.
        command: What runs steps; their folders are appended.
    """

    def __init__(
        self,
        folder: Path,
        config_path: str,
        checkpoint: str,
        weights: str,
        settings: FinetuneSettings | None,
        headline: Sequence[str],
        console: Console,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.folder, self.config_path, self.checkpoint, self.weights = folder, config_path, checkpoint, weights
        self.config: Config = read_config(config_path)
        self.settings, self.headline, self.console, self.command = settings, headline, console, command
        self.models: dict[str, list[Path]] = {}
        self.failed: list[Path] = []
        self.left = TimeLeft()

    def add(
        self,
        name: str,
        plan: Path | None,
        seed: int | None = None,
        checkpoint: str = CHECKPOINT_FILE,
        more: Mapping[str, Any] | None = None,
    ) -> Path:
        """Evaluate a plan's pruned model, or the dense one, fine-tuned if there is a seed. Returns the result.

        Args:
            name: Of the step.
            plan: Folder with plan, config and ``checkpoint``; None: the dense model.
            seed: Of fine-tuning.
            checkpoint: File with the pruned weights.
            more: What these weights depend on besides the plan and the dense weights.
        """
        folder = self.folder / name
        settings = None if seed is None or self.settings is None else replace(self.settings, seed=seed)
        plan_hash = None if plan is None else PruningPlan.load(plan / PLAN_FILE).hash
        identity = {
            **model_identity(self.config, self.weights, plan_hash),
            **(more or {}),
            "finetune": settings and asdict(settings),
        }
        result = folder / "accuracy.json"
        if (
            result.is_file()
            and read_json(result, what="accuracy", schema_version=SCHEMA_VERSION).get("identity") == identity
        ):
            return result
        write_json(
            folder / "step.json",
            {
                "schema_version": SCHEMA_VERSION,
                "config": self.config_path,
                "checkpoint": self.checkpoint if plan is None else str(plan / checkpoint),
                "plan": None if plan is None else str(plan),
                "finetune": settings and asdict(settings),
                "headline": list(self.headline),
                "identity": identity,
            },
        )
        model = "dense" if plan is None else plan.name
        if model not in self.models:
            self.left.add("model")
        self.models.setdefault(model, []).append(folder)
        return result

    def run(self, cores: Sequence[int]) -> None:
        """Do all steps, those of one model at a time on each core; raises `MdpError` if one failed."""
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for model in self.models:
            waiting.put(model)
        threads = [threading.Thread(target=self._work, args=(waiting, core, len(cores)), daemon=True) for core in cores]
        with step_bar(self.console) as bar:
            task = bar.add_task("evaluate and fine-tune", total=self.left.total)
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                threads[0].join(0.2) if threads[0].is_alive() else time.sleep(0.2)
                bar.update(task, completed=self.left.ended)
        if self.failed:
            raise MdpError(
                f"{len(self.failed)} of {self.left.total} models failed, the first: {self.failed[0]}; "
                "mend what it says and run again: the others are kept"
            )

    def _work(self, waiting: queue.SimpleQueue[str], core: int, cores: int) -> None:
        while True:
            try:
                model = waiting.get_nowait()
            except queue.Empty:
                return
            start = time.perf_counter()
            path = self.folder / f"{model}.log"
            with path.open("w", encoding="utf-8") as log:
                code = subprocess.run(
                    ["taskset", "-c", str(core), *self.command, *map(str, self.models[model])],
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    check=False,
                ).returncode
            if code:
                self.failed.append(path)
            seconds = time.perf_counter() - start
            self.left.end("model", seconds)
            self.console.print(
                f"[{self.left.ended} of {self.left.total}] {model}: {'FAILED, ' if code else ''}"
                f"{len(self.models[model])} evaluations and trainings, {seconds:.0f} s on core {core}"
                f"{self.left.sentence(cores)}",
                highlight=False,
                markup=False,
            )


def run_step(folder: Path) -> None:
    """Evaluate, after training where the step says so; the result is its ``accuracy.json``."""
    step = read_json(folder / "step.json", what="step", schema_version=SCHEMA_VERSION)
    console = Console()
    config = read_config(step["config"] if step["plan"] is None else Path(step["plan"], CONFIG_FILE))
    checkpoint = Path(step["checkpoint"])
    if step["finetune"] is not None:
        settings = FinetuneSettings(**step["finetune"])
        if "max_iters" not in (config.get("train_cfg") or {}):  # a config that counts epochs
            config.train_cfg = dict(type="IterBasedTrainLoop", max_iters=settings.iterations)
        checkpoint = finetune(config, checkpoint, folder / "training", settings, step["identity"], console)
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state = content.get("state_dict", content)
    evaluate(config, state, folder / "accuracy.json", step["identity"], console, step["headline"])


def main() -> int:
    """Run the steps in the folders that the command line names."""
    MMLogger.get_instance("mdp", log_level="WARNING")
    try:
        for folder in sys.argv[1:]:
            run_step(Path(folder))
    except MdpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
