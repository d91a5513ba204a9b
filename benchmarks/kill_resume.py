"""SIGKILL at random moments, then the same command again: does it end where an uninterrupted run ends?

    python benchmarks/kill_resume.py --json docs/results/kill_resume.json

Runs ``tools/train.py`` (training; with ImportanceHook; with an MDPPruneHook schedule) and ``tools/prune.py`` on a tiny
data set. Every run is a process of its own, forked from one that has already imported everything. The program itself
can be stopped and run again; it goes on with the kills that are missing in the JSON file.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import random
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config

import mdp_mmdet3d.runner.job  # noqa: F401  imported once for all runs
import projects.streampetr  # noqa: F401
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import read_json, read_npz, write_json
from mdp_mmdet3d.importance.table import SCHEMA_VERSION as IMPORTANCE_VERSION
from mdp_mmdet3d.simdata.mini_nuscenes import easy_spec, write_mini_nuscenes
from mdp_mmdet3d.surgery.plan import PruningPlan
from projects.streampetr.train_loop import STATE_KEY

ROOT = Path(__file__).resolve().parents[1]
ITERATIONS = 10
LATENCIES = ("latency_table.json", "whole_latency.json")
SCHEMA_VERSION = 1


def start(arguments: list[str], log: Path) -> int:
    """Process id of a fork that runs a tool as the command line would, in a process group of its own."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    code = 1
    try:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(arguments: list[str], log: Path, kill_after_s: float = float("inf")) -> tuple[float, bool]:
    """Run a tool, perhaps kill it.

    Returns:
        Seconds it ran, and whether it was killed.

    Raises:
        MdpError: It failed.
    """
    began = time.perf_counter()
    pid = start(arguments, log)
    try:
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            seconds = time.perf_counter() - began
            if done:
                break
            if seconds >= kill_after_s:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return seconds, True
            time.sleep(0.005)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        raise
    if os.waitstatus_to_exitcode(status) != 0:
        raise MdpError(f"{' '.join(arguments)} failed; see {log}:\n{log.read_text()[-1500:]}")
    return seconds, False


def digest(tensors: Iterable[tuple[str, Any]]) -> str:
    """Of names and exact values."""
    found = hashlib.sha256()
    for name, value in sorted(tensors):
        found.update(name.encode())
        found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()[:16]


def training_result(folder: Path) -> dict[str, str]:
    """Weights, optimizer and memory at the end."""
    data = torch.load(folder / f"iter_{ITERATIONS}.pth", weights_only=True)
    moments = {f"{i}.{k}": v for i, state in data["optimizer"]["state"].items() for k, v in state.items()}
    memory = data[STATE_KEY]["ranks"][0]["memory"]
    return {
        "weights": digest(data["state_dict"].items()),
        "optimizer": digest(moments.items()),
        "memory": digest(memory.items()),
    }


def importance_result(folder: Path) -> dict[str, str]:
    """Every score."""
    _, arrays = read_npz(folder / "importance.npz", what="importance", schema_version=IMPORTANCE_VERSION)
    return {"importance": digest(arrays.items())}


def pruning_result(folder: Path) -> dict[str, str]:
    """Plan and pruned weights, which must belong together."""
    plan = PruningPlan.load(folder / "plan.json")
    data = torch.load(folder / "pruned.pth", weights_only=True)
    if data["meta"]["mdp_plan"]["hash"] != plan.hash:
        raise MdpError(f"{folder}: plan.json and pruned.pth do not belong together")
    return {"plan": plan.hash, "weights": digest(data["state_dict"].items())}


def job_result(folder: Path) -> dict[str, str]:
    """Importance, plan and pruned weights of ``tools/prune.py``."""
    return importance_result(folder) | pruning_result(folder)


def found_files(folder: Path) -> list[str]:
    """What the killed run had written, in the order of writing; temporary files start with a dot."""
    files = [path for path in folder.glob("*") if path.is_file() and path.name not in LATENCIES]
    return [path.name for path in sorted(files, key=lambda path: path.stat().st_mtime_ns)]


class Area:
    """One kind of run that is killed.

    Args:
        name: In the result.
        tool: File in tools/.
        config: Config file.
        result: What must be equal at the end.
        resume: Added to the command after a kill.
        given: Files that every run starts with.
    """

    def __init__(
        self,
        name: str,
        tool: str,
        config: Path,
        result: Callable[[Path], dict[str, str]],
        resume: tuple[str, ...] = (),
        given: tuple[Path, ...] = (),
    ) -> None:
        self.name, self.tool, self.config, self.result = name, tool, config, result
        self.resume, self.given = resume, given

    def prepare(self, folder: Path) -> Path:
        """An empty work directory with the given files."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in self.given:
            shutil.copy(path, folder)
        return folder

    def command(self, folder: Path) -> list[str]:
        """The tool's command line."""
        return [str(ROOT / "tools" / self.tool), str(self.config), "--work-dir", str(folder)]

    def whole(self, folder: Path) -> dict[str, Any]:
        """An uninterrupted run: what it gives, how long it takes, and when it writes its first file."""
        self.prepare(folder)
        began = time.time()
        seconds, _ = run(self.command(folder), folder.with_suffix(".log"))
        first = (
            min(path.stat().st_mtime for path in folder.iterdir() if path.is_file() and path.name not in LATENCIES)
            - began
        )
        return {"first_file_s": round(first, 2), "seconds": round(seconds, 2), "result": self.result(folder)}

    def kill(self, folder: Path, after_s: float, expected: dict[str, str]) -> dict[str, Any]:
        """Kill a run, run it again, compare; without ``same`` where the run had ended before it could be killed."""
        self.prepare(folder)
        log = folder.with_suffix(".log")
        seconds, killed = run(self.command(folder), log, after_s)
        if not killed:
            return {"ended_after_s": seconds}
        found = found_files(folder)
        again_s, _ = run([*self.command(folder), *self.resume], log)
        return {
            "killed_after_s": round(seconds, 3),
            "found": found,
            "again_s": round(again_s, 2),
            "same": self.result(folder) == expected,
        }


def kill_often(
    area: Area, folder: Path, entry: dict[str, Any], kills: int, seed: int, save: Callable[[], None]
) -> None:
    """Fill ``entry`` with an uninterrupted run and the kills that it lacks, between its first file and its end."""
    if "whole" not in entry:
        area.whole(folder / f"{area.name}_whole")  # the first run is slower: its files are not cached
        entry["whole"] = area.whole(folder / f"{area.name}_whole")
        save()
    whole = entry["whole"]
    while len(entry["runs"]) < kills:
        place = random.Random(f"{seed} {area.name} {len(entry['runs'])}").random()
        moment = whole["first_file_s"] + place * (whole["seconds"] - whole["first_file_s"])
        outcome = area.kill(folder / area.name, moment, whole["result"])
        if "ended_after_s" in outcome:
            whole["seconds"] = round(outcome["ended_after_s"], 2)
            continue
        entry["runs"].append(outcome)
        save()
        print(
            f"{area.name} {len(entry['runs'])}: killed after {outcome['killed_after_s']:.2f} of "
            f"{whole['seconds']:.2f} s, same={outcome['same']}",
            flush=True,
        )


def make_config(path: Path, root: Path, hooks: list[dict], iterations: int) -> Path:
    """The mini config on the tiny data set; dropout on, so that random numbers matter."""
    os.environ["MINI_NUSCENES_ROOT"] = str(root)
    config = Config.fromfile(ROOT / "configs" / "streampetr_mini.py")
    config.model.pts_bbox_head.decoder.update(dropout=0.1)
    config.train_cfg.update(max_iters=iterations, val_interval=iterations + 1)
    config.train_dataloader.batch_size = 1
    config.train_dataloader.dataset.scene_parts = 1
    config.default_hooks.checkpoint.interval = 2
    config.default_hooks.logger.interval = 1
    for key in ("val_dataloader", "val_evaluator", "val_cfg"):
        config[key] = None
    config.log_level = "WARNING"
    config.custom_hooks += hooks
    config.prune = dict(
        budget=0.6,
        frames=8,
        input_size=(64, 176),
        max_options=4,
        channel_multiple=8,
        rounds=2,
        fit_networks=2,
        refinements=0,
    )
    config.dump(path)
    return path


def settle_latencies(config: Path, folder: Path) -> None:
    """Run ``tools/prune.py`` until the table has every entry that its solves ask for: later runs measure none."""
    for attempt in range(6):
        before = (folder / LATENCIES[0]).read_bytes() if attempt else b""
        run([str(ROOT / "tools" / "prune.py"), str(config), "--work-dir", str(folder)], folder.with_suffix(".log"))
        if (folder / LATENCIES[0]).read_bytes() == before:
            return
    raise MdpError(f"the latency table in {folder} does not settle")


def make_areas(folder: Path) -> list[Area]:
    """All areas; the data set and the latencies are made on the first call."""
    root = folder / "nuscenes"
    if not (root / "nuscenes_infos_val.pkl").exists():
        shutil.rmtree(root, ignore_errors=True)
        write_mini_nuscenes(root, easy_spec(scenes=3, frames=6, seed=5))
    plain = make_config(folder / "plain.py", root, [], ITERATIONS)
    latencies = folder / "latencies"
    if not (latencies / "settled").exists():
        latencies.mkdir(exist_ok=True)
        settle_latencies(plain, latencies)
        (latencies / "settled").touch()
    importance = make_config(
        folder / "importance.py", root, [dict(type="ImportanceHook", num_steps=7, begin=2)], ITERATIONS
    )
    schedule = dict(type="MDPPruneHook", latency_dir=str(latencies), steps_each=3, num_prunings=3)
    pruning = make_config(folder / "pruning.py", root, [schedule], ITERATIONS)
    resume = ("--resume",)
    return [
        Area("training", "train.py", plain, training_result, resume),
        Area("importance_hook", "train.py", importance, importance_result, resume),
        Area("pruning_hook", "train.py", pruning, pruning_result, resume),
        Area("prune_tool", "prune.py", plain, job_result, given=tuple(latencies / name for name in LATENCIES)),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="per area")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, default=Path("work_dirs/kill_resume"), help="work directories")
    parser.add_argument("--json", type=Path, help="result; default: in the folder")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = args.json or folder / "kill_resume.json"
    head = {
        "schema_version": SCHEMA_VERSION,
        "kills": args.kills,
        "seed": args.seed,
        "command": "python benchmarks/kill_resume.py",
    }
    data: dict[str, Any] = {
        **head,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads",
        "areas": {},
    }
    if path.exists():
        earlier = read_json(path, what="result", schema_version=SCHEMA_VERSION)
        data = earlier if {key: earlier.get(key) for key in head} == head else data
    for area in make_areas(folder):
        entry = data["areas"].setdefault(area.name, {"runs": []})
        kill_often(area, folder, entry, args.kills, args.seed, lambda: write_json(path, data))
        same = sum(outcome["same"] for outcome in entry["runs"])
        print(f"{area.name}: {same} of {len(entry['runs'])} killed runs end as the uninterrupted one", flush=True)
    wrong = sum(not outcome["same"] for entry in data["areas"].values() for outcome in entry["runs"])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
