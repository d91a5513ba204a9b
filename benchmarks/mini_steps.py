"""Evaluations and trainings of `mini_nuscenes.py`, each in its own process, one at a time on each core."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from rich.console import Console

from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import read_json, write_json
from mdp_mmdet3d.runner.recovery import evaluate, finetune, model_identity
from mdp_mmdet3d.runner.settings import FinetuneSettings
from mdp_mmdet3d.surgery.plan import PruningPlan

SCHEMA_VERSION = 1


class Steps:
    """Work to do, and who does it.

    Args:
        folder: Results and logs, one folder per step.
        config_path: The dense config.
        checkpoint: The dense weights.
        weights: Their identity.
        settings: How to fine-tune; the seed is that of the step.
        console: Says what ended.
    """

    def __init__(
        self,
        folder: Path,
        config_path: str,
        checkpoint: str,
        weights: str,
        settings: FinetuneSettings,
        console: Console,
    ) -> None:
        self.folder, self.config_path, self.checkpoint, self.weights = folder, config_path, checkpoint, weights
        self.config: Config = read_config(config_path)
        self.settings, self.console = settings, console
        self.waiting: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []
        self.failed: list[Path] = []
        self.added = self.ended = 0

    def add(self, name: str, plan: Path | None, seed: int | None) -> Path:
        """Evaluate a plan's pruned model, or the dense one, fine-tuned if there is a seed. Returns the result."""
        folder = self.folder / name
        settings = None if seed is None else replace(self.settings, seed=seed)
        plan_hash = None if plan is None else PruningPlan.load(plan / "plan.json").hash
        identity = {**model_identity(self.config, self.weights, plan_hash), "finetune": settings and asdict(settings)}
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
                "checkpoint": self.checkpoint,
                "plan": None if plan is None else str(plan),
                "finetune": settings and asdict(settings),
                "identity": identity,
            },
        )
        self.added += 1
        self.waiting.put(folder)
        return result

    def work_on(self, core: int) -> None:
        """Let a core take steps until none is left after `finish`."""
        thread = threading.Thread(target=self._work, args=(core,), daemon=True)
        thread.start()
        self.threads.append(thread)

    def finish(self) -> None:
        """Wait for all steps; raises `MdpError` if one failed."""
        for _ in self.threads:
            self.waiting.put(None)
        for thread in self.threads:
            thread.join()
        if self.failed:
            raise MdpError(
                f"{len(self.failed)} of {self.added} steps failed, the first: {self.failed[0]}/log.txt; "
                "mend what it says and run again: the others are kept"
            )

    def _work(self, core: int) -> None:
        while (folder := self.waiting.get()) is not None:
            start = time.perf_counter()
            with (folder / "log.txt").open("w", encoding="utf-8") as log:
                code = subprocess.run(
                    ["taskset", "-c", str(core), sys.executable, __file__, str(folder)],
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    check=False,
                ).returncode
            self.ended += 1
            if code:
                self.failed.append(folder)
            self.console.print(
                f"[{self.ended} of {self.added}] {folder.name}: {'FAILED, ' if code else ''}"
                f"{time.perf_counter() - start:.0f} s on core {core}",
                highlight=False,
            )


def run_step(folder: Path) -> None:
    """What a process of `Steps` does."""
    step = read_json(folder / "step.json", what="step", schema_version=SCHEMA_VERSION)
    console = Console()
    if step["plan"] is None:
        config, checkpoint = read_config(step["config"]), Path(step["checkpoint"])
    else:
        config, checkpoint = read_config(Path(step["plan"], "pruned_config.py")), Path(step["plan"], "pruned.pth")
    if step["finetune"] is not None:
        checkpoint = finetune(
            config, checkpoint, folder / "training", FinetuneSettings(**step["finetune"]), step["identity"], console
        )
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    evaluate(config, state, folder / "accuracy.json", step["identity"], console, ("mAP", "NDS"))


def main() -> int:
    MMLogger.get_instance("mdp", log_level="WARNING")
    try:
        run_step(Path(sys.argv[1]))
    except MdpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
