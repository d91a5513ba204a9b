"""A probe bundle, killed with SIGKILL at random moments while it measures: is an entry lost or measured twice?

    python benchmarks/kill_bundle.py configs/streampetr_mdp.py --json docs/results/kill_bundle.json

The bundle runs in a virtual environment of the system's Python with numpy and onnxruntime alone, which the program
makes in the work directory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import read_json, write_json
from mdp_mmdet3d.latency import LatencyTable
from mdp_mmdet3d.latency.sampling import EntryKey
from mdp_mmdet3d.latency.table import Entry

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("numpy", "onnxruntime")


def make_environment(folder: Path, system_python: str) -> Path:
    """A virtual environment with `PACKAGES` alone; returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([system_python, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """Version per installed package."""
    listed = subprocess.run([str(python), "-m", "pip", "list", "--format=json"], check=True, capture_output=True)
    return {package["name"]: package["version"] for package in json.loads(listed.stdout)}


def entries(path: Path) -> dict[EntryKey, Entry]:
    """Each entry of a table that a probe writes."""
    return {(signature, widths): entry for signature, widths, entry in LatencyTable.load(path)}


def run(command: list[str], log: Path, kill_after_s: float | None = None) -> bool:
    """Run the probe; returns whether it was killed. The clock starts with the first operator it measured."""
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream)
        assert process.stdout is not None
        stream.write(os.read(process.stdout.fileno(), 4096))
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(process.pid, signal.SIGKILL)
        stream.write(process.communicate()[0])
    if process.returncode not in (0, -signal.SIGKILL):
        raise MdpError(f"{' '.join(command)} failed with status {process.returncode}; see {log}")
    return process.returncode != 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="e.g. configs/streampetr_mdp.py")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/kill_bundle"))
    parser.add_argument("--python", default="/usr/bin/python3", help="of the system; makes the virtual environment")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--longest", type=float, default=5.0, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    work = args.work_dir
    work.mkdir(parents=True, exist_ok=True)
    table, log = work / "latency_table.json", work / "probe.log"
    table.unlink(missing_ok=True)
    bundle = work / "bundle.zip"
    subprocess.run(
        [sys.executable, str(ROOT / "tools/profile_latency.py"), args.config, "--bundle", str(bundle)], check=True
    )
    zipfile.ZipFile(bundle).extractall(work / "bundle")
    manifest = read_json(work / "bundle/manifest.json", what="manifest", schema_version=1)
    total = sum(len(operator["probes"]) for operator in manifest["operators"])
    python = make_environment(work / "venv", args.python)
    command = [str(python), str(work / "bundle/probe.py"), "--out", str(table)]

    generator = random.Random(args.seed)
    kept: dict[EntryKey, Entry] = {}
    history, lost, changed = [], 0, 0
    for number in range(args.kills):
        moment = generator.uniform(0.0, args.longest)
        if not run(command, log, moment):
            raise MdpError(f"the probe was complete before kill {number + 1} of {args.kills}; give a smaller --longest")
        now = entries(table)
        lost += sum(key not in now for key in kept)
        if len(kept) < total:
            changed += sum(now[key] != entry for key, entry in kept.items() if key in now)
        print(f"kill {number + 1} after {moment:.2f} s: {len(now)} of {total} entries", flush=True)
        history.append({"after_s": round(moment, 3), "entries": len(now)})
        kept = now
    if len(kept) == total:
        raise MdpError(
            "everything was measured before the last kill: what is measured again was disturbed; give a "
            "smaller --longest"
        )
    run(command, log)
    final = entries(table)
    disturbed = len(LatencyTable.load(table).disturbed())
    again = [key for key, entry in final.items() if entry.attempts > 1]
    # At the end disturbed entries are measured again, on purpose: those are no longer the same.
    changed += sum(final[key] != entry for key, entry in kept.items() if key in final and key not in again)
    lost += sum(key not in final for key in kept)
    result = {
        "python": subprocess.run([str(python), "--version"], capture_output=True, text=True).stdout.strip(),
        "packages": installed(python),
        "entries": len(final),
        "of": total,
        "kills": history,
        "lost": lost,
        "measured_twice_before_all_were_measured": changed,
        "disturbed_and_measured_again": len(again),
        "still_disturbed": disturbed,
    }
    print(
        f"{len(final)} of {total} entries; {lost} lost, {changed} measured twice before all were measured; "
        f"{len(again)} that were disturbed measured again at the end; {result['packages']}"
    )
    if args.json is not None:
        write_json(args.json, result)
    return 0 if lost == changed == 0 and len(final) == total else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MdpError as failure:
        sys.exit(f"error: {failure}")
