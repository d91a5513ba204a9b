"""Measure the operators of this bundle on this machine and write a latency table.

    python probe.py [--backend onnxruntime|tensorrt] [--out latency_table.json]

Needs Python >= 3.8, numpy and the runtime. Stop it at any moment and run it again: it goes on with the next operator.
Then it measures a few whole networks, which tie the sum of operators to what a network takes.
Bring the table back to the machine that prunes: tools/prune.py CONFIG --latency-table latency_table.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mdp_mmdet3d.device import processor_name, system_name

TABLE_VERSION = 1
MANIFEST_VERSION = 1
MAX_ATTEMPTS = 3
DISTURBED = 1.1
DEVICE_FIELDS = ("processor", "runtime", "runtime_version", "threads", "precision")


class ProbeError(Exception):
    """Something the user can mend; printed without a traceback."""


def load_json(path: Path, what: str, version: int) -> dict[str, Any]:
    """Read a versioned JSON object; raises `ProbeError`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = data["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProbeError(f"{what} {path} is missing or damaged ({error}); delete it and run again") from error
    if found != version:
        raise ProbeError(f"{what} {path} has schema_version {found}, this probe reads {version}; make a new bundle")
    return data


def save_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON so that a kill at any moment leaves the old or the new file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(data, stream, indent=1, allow_nan=False)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def make_timer(backend: str, folder: Path, manifest: dict[str, Any]) -> Any:
    """The timer of a backend; raises `ProbeError` if its runtime cannot be used here."""
    reference = manifest["reference"]
    arguments = (str(folder / reference["file"]), reference["inputs"])
    try:
        if backend == "onnxruntime":
            if manifest["precision"] != "float32":
                raise ProbeError(
                    f"this bundle is made for {manifest['precision']}, ONNX Runtime on the CPU measures "
                    "float32; make the bundle with --precision float32"
                )
            from onnxruntime_timer import OnnxRuntimeTimer

            return OnnxRuntimeTimer(arguments)
        from tensorrt_timer import TensorRtTimer

        return TensorRtTimer(arguments, precision=manifest["precision"])
    except ImportError as error:
        raise ProbeError(f"backend {backend} cannot be used here: {error}; install its runtime") from error
    except RuntimeError as error:
        raise ProbeError(f"backend {backend} cannot be used here: {error}") from error


def open_table(path: Path, timer: Any, manifest: dict[str, Any]) -> dict[str, Any]:
    """The table at ``path``, or an empty one; raises `ProbeError` if it was made elsewhere or from another bundle."""
    device = {
        "processor": getattr(timer, "processor", None) or processor_name(),
        **timer.runtime_fields(),
        "system": ", ".join(filter(None, (system_name(), getattr(timer, "driver", None)))),
        "python": platform.python_version(),
    }
    operators = [
        {"operator": o["operator"], "attributes": o["attributes"], "entries": []} for o in manifest["operators"]
    ]
    if not path.exists():
        return {
            "schema_version": TABLE_VERSION,
            "device": device,
            "protocol": timer.protocol(),
            "operators": operators,
            "networks": [],
        }
    table = load_json(path, "latency table", TABLE_VERSION)
    different = [f for f in DEVICE_FIELDS if table["device"].get(f) != device[f]]
    if different or table["protocol"] != timer.protocol():
        raise ProbeError(
            f"{path} was measured on another device or in another way "
            f"({', '.join(different) or 'protocol'}); give another --out"
        )
    same = [(o["operator"], o["attributes"]) for o in table["operators"]]
    if same != [(o["operator"], o["attributes"]) for o in operators]:
        raise ProbeError(f"{path} was measured from another bundle; give another --out")
    return table


def pending(table: dict[str, Any], manifest: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Operator index and probe of what was not measured yet; once that is nothing, of what was measured while busy."""
    times = [e["reference_ms"] for o in table["operators"] for e in o["entries"] if e["reference_ms"] > 0]
    limit = DISTURBED * min(times) if times else 0.0
    missing, disturbed = [], []
    for index, operator in enumerate(manifest["operators"]):
        known = {tuple(e["widths"]): e for e in table["operators"][index]["entries"]}
        for probe in operator["probes"]:
            entry = known.get(tuple(probe["widths"]))
            if entry is None:
                missing.append((index, probe))
            elif entry["reference_ms"] > limit and entry["attempts"] < MAX_ATTEMPTS:
                disturbed.append((index, probe))
    return missing or disturbed


def add_entry(table: dict[str, Any], index: int, probe: dict[str, Any], result: dict[str, Any]) -> None:
    """Book a measurement; of several attempts the fastest stays."""
    entries = table["operators"][index]["entries"]
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    entry = dict(result, widths=probe["widths"], time=now, attempts=1)
    for position, old in enumerate(entries):
        if old["widths"] == probe["widths"]:
            entries[position] = dict(min(old, entry, key=lambda e: e["ms"]), attempts=old["attempts"] + 1)
            return
    entries.append(entry)


def disturbed_entries(table: dict[str, Any]) -> int:
    """Entries and networks that were measured while something else ran."""
    measured = [e for o in table["operators"] for e in o["entries"]] + table.get("networks", [])
    times = [e["reference_ms"] for e in measured if e["reference_ms"] > 0]
    return sum(e["reference_ms"] > DISTURBED * min(times) for e in measured)


def run_networks(folder: Path, backend: str, out: Path, table: dict[str, Any], timer: Any, known: list[Any]) -> None:
    """Measure the bundle's whole networks together, again while they are disturbed."""
    if not known:
        return
    from networks import measure_networks

    times = [e["reference_ms"] for o in table["operators"] for e in o["entries"] if e["reference_ms"] > 0]
    limit = DISTURBED * min(times, default=0.0)
    done = {network["name"]: network for network in table.setdefault("networks", [])}
    while True:
        attempts = max((network["attempts"] for network in done.values()), default=0)
        complete = all(network["name"] in done for network in known)
        quiet = all(network["reference_ms"] <= limit for network in done.values())
        if complete and (quiet or attempts >= MAX_ATTEMPTS):
            return
        before = timer.reference_ms()
        try:
            found = measure_networks(
                folder,
                known,
                backend,
                lambda count, total: print(f"\rwhole networks: round {count} of {total}   ", end="", flush=True),
            )
        except RuntimeError as error:
            raise ProbeError(f"whole networks: {error}") from error
        print()
        busiest = max(before, timer.reference_ms())
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        for network in known:
            name = network["name"]
            fields = {key: network[key] for key in ("name", "model_digest", "widths", "removed")}
            new = dict(fields, **found[name], reference_ms=busiest, time=now)
            old = done.get(name, new)
            done[name] = dict(min(old, new, key=lambda n: sum(n["engines_ms"].values())), attempts=attempts + 1)
        table["networks"] = list(done.values())
        save_json(out, table)


def run(folder: Path, backend: str, out: Path) -> None:
    """Measure everything that ``out`` lacks."""
    manifest = load_json(folder / "manifest.json", "manifest", MANIFEST_VERSION)
    timer = make_timer(backend, folder, manifest)
    table = open_table(out, timer, manifest)
    total = sum(len(operator["probes"]) for operator in manifest["operators"])
    for attempt in range(MAX_ATTEMPTS):
        todo = pending(table, manifest)
        complete = sum(len(operator["entries"]) for operator in table["operators"]) == total
        random.Random(attempt).shuffle(todo)
        start = datetime.now()
        for count, (index, probe) in enumerate(todo):
            try:
                result = timer.measure(str(folder / probe["file"]), probe["inputs"], probe["copies"])
            except RuntimeError as error:
                raise ProbeError(
                    f"{manifest['operators'][index]['operator']} {probe['widths']} ({probe['file']}): {error}"
                ) from error
            add_entry(table, index, probe, result)
            save_json(out, table)
            left = (datetime.now() - start).total_seconds() / (count + 1) * (len(todo) - count - 1)
            title = "disturbed ones again" if complete else "measuring"
            print(f"\r{title}: {count + 1} of {len(todo)}, {left:.0f} s left   ", end="", flush=True)
        if todo:
            print()
    run_networks(folder, backend, out, table, timer, manifest.get("networks", []))
    count = disturbed_entries(table)
    print(
        f"{total} operators, {len(table.get('networks', []))} whole networks, {count} measured while something else ran"
    )
    if 2 * count > total + len(table.get("networks", [])):
        print(
            f"warning: most of this table was measured while something else ran (the reference operator took more than "
            f"{DISTURBED} times its fastest): its latencies are too long, and unequally so. Stop other work, fix the "
            "clocks, and measure again with another --out",
            file=sys.stderr,
        )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("onnxruntime", "tensorrt"), default="onnxruntime")
    parser.add_argument("--out", type=Path, default=Path("latency_table.json"))
    args = parser.parse_args()
    try:
        run(Path(__file__).resolve().parent, args.backend, args.out)
    except ProbeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on")
        return 130
    print(f"complete: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
