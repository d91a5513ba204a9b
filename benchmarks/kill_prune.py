"""SIGKILL at random moments of one ``tools/prune.py`` with loss values and repair: is anything lost or done twice?

    python benchmarks/kill_prune.py --json docs/results/kill_prune.json

An undisturbed run, and one in another work directory that is killed again and again, at random moments of every step.
Then the same command to the end. Plan, weights and report must be equal, and no unit of work (the importance, a plan's
loss, a repaired layer) that was written to the disk may be done again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kill_resume import LATENCIES, ROOT, digest, make_config, settle_latencies, start
from mmengine.config import Config

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import write_json
from mdp_mmdet3d.importance.loss_probe import LossProbe
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.runner.outcome import Steps
from mdp_mmdet3d.simdata.mini_nuscenes import easy_spec, write_mini_nuscenes
from mdp_mmdet3d.surgery.plan import PruningPlan
from mdp_mmdet3d.surgery.repair import RepairStore

SCHEMA_VERSION = 1
WORK_VARIABLE = "KILL_PRUNE_WORK"
SAME = ("plan_hash", "budget", "importance_kept", "repair", "values", "weights", "interpolated_entries")
"""What of the report does not depend on how fast the machine is at the moment."""


def note(kind: str, name: str) -> None:
    """Append a line to the record of work; short lines are written whole."""
    if path := os.environ.get(WORK_VARIABLE):
        with Path(path).open("a") as stream:
            stream.write(f"{kind}\t{name}\n")


def watch() -> None:
    """Let every run note which step begins, and what it has finished and written; they are forked from this process."""

    def after(owner: type, method: str, describe: Callable[..., tuple[str, str]]) -> None:
        original = getattr(owner, method)

        def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            note(*describe(self, *args))
            return result

        setattr(owner, method, noting)

    after(RepairStore, "save", lambda store, result, tensors: ("layer", f"{store.identity} {result.name}"))
    after(ImportanceTable, "save", lambda table, *_: ("importance", f"{table.weights} {table.batches}"))
    keep, call = LossProbe._keep, Steps.__call__

    def noting_keep(self: LossProbe, key: str, losses: Any) -> None:
        new = len(self._known.get(key, ())) < len(losses)
        keep(self, key, losses)
        if new:
            note("loss", f"{key} {len(losses)}")

    def noting_step(self: Steps, name: str, about: str = "") -> Any:
        note("step", name)
        return call(self, name, about)

    LossProbe._keep = noting_keep  # type: ignore[method-assign]
    Steps.__call__ = noting_step  # type: ignore[method-assign]


def read_work(path: Path) -> list[tuple[str, str]]:
    """Kind and name per line."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(kind, name) for kind, _, name in (line.partition("\t") for line in lines)]


def result_of(folder: Path) -> dict[str, Any]:
    """What must be equal; plan, weights and report must belong together."""
    plan = PruningPlan.load(folder / "plan.json")
    data = torch.load(folder / "pruned.pth", weights_only=True)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if not data["meta"]["mdp_plan"]["hash"] == plan.hash == report["plan_hash"]:
        raise MdpError(f"{folder}: plan.json, pruned.pth and report.json do not belong together")
    return {
        "plan": plan.hash,
        "weights": digest(data["state_dict"].items()),
        "report": {key: report[key] for key in SAME},
    }


def make_job(folder: Path) -> tuple[Path, Path]:
    """Config of the mini StreamPETR on a tiny data set, and a folder with settled latencies."""
    root = folder / "nuscenes"
    if not (root / "nuscenes_infos_val.pkl").exists():
        shutil.rmtree(root, ignore_errors=True)
        write_mini_nuscenes(root, easy_spec(scenes=2, frames=4, seed=5))
    path = make_config(folder / "job.py", root, [], 1)
    config = Config.fromfile(path)
    config.checkpoint = str(ROOT / "checkpoints" / "streampetr_mini.pth")
    config.model.guidance = None
    config.prune.update(
        frames=4,
        max_options=3,
        importance=dict(type="loss", frames=4, max_frames=4, widths=1, corrections=1),
        repair=dict(frames=4, positions=500),
    )
    config.dump(path)
    latencies = folder / "latencies"
    if not (latencies / "settled").exists():
        latencies.mkdir(exist_ok=True)
        settle_latencies(path, latencies)
        (latencies / "settled").touch()
    return path, latencies


class Job:
    """One work directory, its record of work, and the command."""

    def __init__(self, config: Path, latencies: Path, folder: Path) -> None:
        self.folder, self.log, self.work = folder, folder.with_suffix(".log"), folder.with_suffix(".work")
        shutil.rmtree(folder, ignore_errors=True)
        for path in (self.log, self.work):
            path.unlink(missing_ok=True)
        folder.mkdir(parents=True)
        for name in LATENCIES:
            shutil.copy(latencies / name, folder)
        self.command = [str(ROOT / "tools" / "prune.py"), str(config), "--work-dir", str(folder)]

    def run(self, kill_in: str | None = None, after_s: float = 0.0) -> tuple[float, bool]:
        """Run it, and kill it ``after_s`` after the step ``kill_in`` has begun.

        Returns:
            Seconds, and whether it was killed.

        Raises:
            MdpError: It failed.
        """
        earlier = len(read_work(self.work))
        os.environ[WORK_VARIABLE] = str(self.work)
        began = time.perf_counter()
        pid = start(self.command, self.log)
        killed = False
        try:
            while True:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    break
                if ("step", kill_in) in read_work(self.work)[earlier:]:
                    time.sleep(after_s)
                    killed = True
                    break
                time.sleep(0.01)
        finally:
            if not done:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        killed = killed and code == -signal.SIGKILL
        if not killed and code != 0:
            raise MdpError(f"{' '.join(self.command)} failed; see {self.log}:\n{self.log.read_text()[-1500:]}")
        return time.perf_counter() - began, killed

    def done_twice(self) -> list[str]:
        """Units of work that were finished more than once."""
        count = Counter(unit for unit in read_work(self.work) if unit[0] != "step")
        return [f"{kind} {name}" for (kind, name), times in count.items() if times > 1]


def places(seconds: dict[str, float], kills: int) -> list[tuple[str, float]]:
    """Step, and the seconds within which to kill, of every kill: in the order of the steps, most in the longest."""
    steps = list(seconds)
    longest = sorted(steps, key=lambda step: -seconds[step])
    count = Counter(steps[i % len(steps)] for i in range(kills - kills % len(steps)))
    count.update(longest[i % min(2, len(steps))] for i in range(kills % len(steps)))
    return [(step, seconds[step] / count[step]) for step in steps for _ in range(count[step])]


def kill_often(job: Job, kills: int, seconds: dict[str, float], seed: int) -> list[dict[str, Any]]:
    """Kill run after run, each at a random moment of a step; ``seconds`` are those of an undisturbed run's steps."""
    generator, history = random.Random(seed), []
    for step, within_s in places(seconds, kills):
        killed = False
        while not killed:  # the last steps may end first
            seconds_run, killed = job.run(step, generator.uniform(0.0, within_s))
        work = read_work(job.work)
        found = next((name for kind, name in reversed(work) if kind == "step"), "start")
        units = len({unit for unit in work if unit[0] != "step"})
        history.append({"after_s": round(seconds_run, 2), "step": found, "units_finished": units})
        print(f"kill {len(history)} after {seconds_run:.2f} s in {found!r}: {units} units of work finished", flush=True)
    job.run()
    return history


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, default=Path("work_dirs/kill_prune"), help="work directories")
    parser.add_argument("--json", type=Path, help="result; default: in the folder")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    config, latencies = make_job(folder)
    watch()
    undisturbed = Job(config, latencies, folder / "undisturbed")
    whole_s, _ = undisturbed.run()
    expected, units = result_of(undisturbed.folder), set(read_work(undisturbed.work))
    seconds = json.loads((undisturbed.folder / "report.json").read_text(encoding="utf-8"))["seconds"]
    seconds = {name: seconds[name] for kind, name in read_work(undisturbed.work) if kind == "step" and name in seconds}
    twice_undisturbed = undisturbed.done_twice()
    print(f"undisturbed: {whole_s:.1f} s, {len(units)} units of work and steps", flush=True)

    job = Job(config, latencies, folder / "killed")
    history = kill_often(job, args.kills, seconds, args.seed)
    found = result_of(job.folder)
    same = {key: found[key] == expected[key] for key in expected}
    lost = sorted(" ".join(unit) for unit in units - set(read_work(job.work)))
    twice = job.done_twice()
    result = {
        "schema_version": SCHEMA_VERSION,
        "command": "python benchmarks/kill_prune.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "seed": args.seed,
        "undisturbed_s": round(whole_s, 1),
        "units_of_work": dict(Counter(kind for kind, _ in units if kind != "step")),
        "undisturbed_done_twice": twice_undisturbed,
        "kills": history,
        "kills_per_step": dict(Counter(kill["step"] for kill in history)),
        "same": same,
        "lost": lost,
        "done_twice": twice,
    }
    write_json(args.json or folder / "kill_prune.json", result)
    print(f"{len(history)} kills, per step {result['kills_per_step']}; same: {same}; lost: {lost}; done twice: {twice}")
    return 0 if all(same.values()) and not lost + twice + twice_undisturbed else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MdpError as failure:
        sys.exit(f"error: {failure}")
