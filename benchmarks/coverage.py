"""What share of an engine's kernels the cost terms of the dense model come to, and what they miss.

    python benchmarks/coverage.py configs/resnet/resnet50_mdp.py --input-size 224 224 --json F

Both sides are kernel times of ONNX Runtime on one thread, the median of the fastest three runs of the fastest of three
loads, so that other work on the machine disturbs them alike. "without calls" leaves out the terms of kind ``call`` and
counts convolutions, linear layers, attentions, feed-forward networks, simple max-poolings and pyramids alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnxruntime as ort
from mmengine.logging import MMLogger

import mdp_mmdet3d.runner  # noqa: F401  registers the pruned model
from mdp_mmdet3d.adapters import adapter_of
from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.files import write_json
from mdp_mmdet3d.latency.backends.onnxruntime import OnnxRuntimeBackend
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.sampling import entries_of
from mdp_mmdet3d.operators.call import CALL_KINDS
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.runtime.graph_manifest import load_manifest

LOADS, WARM, RUNS = 3, 2, 8


def kernels_ms(file: Path, folder: Path) -> Counter[str]:
    """Milliseconds of a graph by type of operator."""
    loads = []
    for load in range(LOADS):
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / f"load{load}")
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(0)
        feed = {
            i.name: rng.standard_normal(i.shape).astype({"tensor(float)": "f4", "tensor(bool)": "?"}.get(i.type, "i8"))
            for i in session.get_inputs()
        }
        for _ in range(WARM + RUNS):
            session.run(None, feed)
        times: dict[tuple[str, str], list[float]] = {}
        for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
            if event.get("name", "").endswith("_kernel_time"):
                times.setdefault((event["name"], event["args"]["op_name"]), []).append(event["dur"] / 1e3)
        found: Counter[str] = Counter()
        for (_, kind), values in times.items():
            found[kind] += statistics.median(sorted(values[WARM:])[:3])
        loads.append(found)
    return min(loads, key=lambda load: sum(load.values()))


def examine(config_path: str, size: tuple[int, int] | None, folder: Path) -> list[dict[str, Any]]:
    """One entry for each engine that runs every frame."""
    config = read_config(config_path, None)
    settings = PruneSettings.from_config(config.get("prune", {}))
    if size:
        settings = dataclasses.replace(settings, input_size=size)
    adapter = adapter_of(config, settings.input_shape, settings.adapter)
    model, _ = adapter.build(config.get("checkpoint"))
    start = time.monotonic()
    space = adapter.trace(model, settings.space_options)
    seconds = time.monotonic() - start
    adapter.export(model, folder / "dense", plan_hash=None, weights="random")
    engines = {name: folder / "dense" / spec.file for name, spec in load_manifest(folder / "dense").engines.items()}
    table = measure_latency(
        space, OnnxRuntimeBackend(), folder / "table.json", policy="none", extra=entries_of(space, {}, ())
    )
    sizes = {dimension.name: dimension.size for dimension in space.dimensions}
    found = []
    for engine in dict.fromkeys(term.engine for term in space.frame_terms()):
        kernels = kernels_ms(engines[engine], folder)
        priced: Counter[str] = Counter()
        for term in space.frame_terms():
            if term.engine == engine:
                kind = term.signature.kind
                if kind in CALL_KINDS:
                    kind = f"call {json.loads(term.signature['call'])['function'].rpartition('.')[2]}"
                priced[kind] += table.lookup(term.signature, term.counts(sizes)).ms
        whole = sum(kernels.values())
        found.append(
            {
                "config": Path(config_path).stem,
                "input_size": list(settings.input_size),
                "engine": engine,
                "trace_s": seconds,
                "dimensions": len(space.dimensions),
                "blocks": len(space.blocks),
                "kernels_ms": whole,
                "without_calls": sum(ms for kind, ms in priced.items() if not kind.startswith("call ")) / whole,
                "share": sum(priced.values()) / whole,
                "kernels": {kind: ms / whole for kind, ms in kernels.most_common()},
                "terms": {kind: ms / whole for kind, ms in priced.most_common()},
                "not_priced": [dataclasses.asdict(u) for u in space.unpriced if u.engine == engine],
            }
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--input-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="instead of the config's")
    parser.add_argument("--json", type=Path, help="file to add the entries to")
    args = parser.parse_args()
    MMLogger.get_instance("mdp", log_level="WARNING")
    with tempfile.TemporaryDirectory() as folder:
        entries = examine(args.config, tuple(args.input_size) if args.input_size else None, Path(folder))
    for entry in entries:
        size = "x".join(map(str, entry["input_size"]))
        missing = ", ".join(f"{u['operator']} x {u['count']}" for u in entry["not_priced"]) or "nothing"
        print(
            f"{entry['config']} {size} {entry['engine']}: kernels {entry['kernels_ms']:.1f} ms; priced "
            f"{entry['without_calls']:.1%} without calls, {entry['share']:.1%} with; without a term: {missing}"
        )
    if args.json:
        known = json.loads(args.json.read_text(encoding="utf-8"))["entries"] if args.json.exists() else []
        names = [(e["config"], e["engine"]) for e in entries]
        known = [e for e in known if (e["config"], e["engine"]) not in names]
        write_json(args.json, {"schema_version": 1, "entries": [*known, *entries]})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
