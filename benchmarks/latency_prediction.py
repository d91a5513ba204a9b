"""How well do latency models predict whole engines? Predicted against measured on structures outside the fit.

Three sets of structures: random, skewed (lopsided widths, many blocks removed) and extreme (largest and smallest
predicted latency per multiply-accumulate of many). Three models: the latency table, HALP's (latency depends on the
output width only, inputs stay dense) and multiply-accumulates times a factor, each fitted to the same few structures.

Structures run in groups, taking turns with the dense one, under ONNX Runtime's profiler; what counts is their time
relative to the dense one of the same group, since a machine drifts by several percent from session to session. The
measured time of an engine is the sum over its kernels of the median of the fastest three runs: other processes only
ever add time, and every kernel of a few milliseconds finds quiet moments where a run of a second does not. Every group
is loaded several times, in another order each time: a session may be several percent slower than another one of
the same network for as long as it lives. The fastest whole runs by the wall clock are reported as well.

``--space FILE`` predicts the same structures with the cost terms of another ``space.json`` of the model too, such as
one that an earlier version of the project wrote.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from mmengine.config import Config
from mmengine.logging import MMLogger
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import nn

from mdp_mmdet3d.adapters import Adapter, adapter_of
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import write_json
from mdp_mmdet3d.latency import (
    LatencyModel,
    LatencyTable,
    Lookup,
    MeasuredNetwork,
    Structure,
    entries_of,
    fit_structures,
)
from mdp_mmdet3d.latency.backends.onnxruntime import OnnxRuntimeBackend
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.structures import random_structure
from mdp_mmdet3d.operators import OPERATORS, OperatorSignature
from mdp_mmdet3d.runner.networks import plan_of_structure
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.space import PruningSpace
from mdp_mmdet3d.surgery.apply import apply_plan

Run = dict[str, Any]  # milliseconds per engine: "kernels_ms", "wall_ms" (each round), and "reference_ms" of its group
Kernel = tuple[str, str]  # name and index of its node
DENSE = "dense"
ENGINES = ("image_encoder", "head")
FITTED = 6
WARMUP = 1  # per load
GROUP = 12  # structures that take turns
POOL_SEED, RANDOM_SEED, SKEWED_SEED = 10_000, 20_000, 30_000


class HalpTable(LatencyTable):
    """Latency by the output width alone: every other width stays dense (HALP, arXiv 2210.06659)."""

    def __init__(self, table: LatencyTable) -> None:
        super().__init__(table.device, table.protocol)
        self._table = table
        self._dense: dict[OperatorSignature, tuple[int, ...]] = {}
        for signature, widths, _ in table:
            old = self._dense.get(signature, widths)
            self._dense[signature] = tuple(map(max, widths, old))

    def lookup(self, signature: OperatorSignature, widths: tuple[int, ...]) -> Lookup:  # noqa: D102
        dense = self._dense[signature]
        if signature.kind == "attention":
            return self._table.lookup(signature, (widths[0], *dense[1:]))
        return self._table.lookup(signature, (*dense[:-1], widths[-1]))


class MacsTable(LatencyTable):
    """Latency proportional to multiply-accumulates."""

    def lookup(self, signature: OperatorSignature, widths: tuple[int, ...]) -> Lookup:  # noqa: D102
        return Lookup(OPERATORS[signature.kind].work(signature, widths).macs * 1e-9, interpolated=False)


@dataclass
class Whole:
    """Exports and measures whole networks in groups that take turns."""

    dense: nn.Module
    space: PruningSpace
    backend: OnnxRuntimeBackend
    adapter: Adapter
    folder: Path
    loads: int
    rounds: int
    console: Console

    def measure(self, structures: list[Structure], cache: Path, groups: int | None = None) -> list[Run] | None:
        """Run every structure; resumable per group.

        Returns:
            One result per structure, or None if ``groups`` more groups were not enough.
        """
        done: list[Run] = json.loads(cache.read_text()) if cache.exists() else []
        for start in range(len(done), len(structures), GROUP)[:groups]:
            group = {f"s{start + i}": s for i, s in enumerate(structures[start : start + GROUP])}
            for name, structure in group.items():
                self._export(structure, name)
            anchor, *own = self._run([DENSE, *group])
            done += [{**run, DENSE: anchor} for run in own]
            write_json(cache, done)
            for name in group:
                shutil.rmtree(self.folder / name)
            self.console.print(f"measured {len(done)} of {len(structures)} structures", highlight=False)
        return done if len(done) == len(structures) else None

    def _run(self, names: list[str]) -> list[Run]:
        kernels: dict[tuple[str, str], dict[Kernel, list[float]]] = {}
        wall_ms: dict[str, dict[str, list[float]]] = {name: {engine: [] for engine in ENGINES} for name in names}
        reference_ms: list[float] = []
        for load in range(self.loads):
            order = random.Random(load).sample(names, len(names))
            with tempfile.TemporaryDirectory() as folder:
                engines = {
                    (name, engine): profiled_session(
                        self.folder / name / f"{engine}.onnx", Path(folder) / f"{name}_{engine}"
                    )
                    for name in order
                    for engine in ENGINES
                }
                for index in range(WARMUP + self.rounds):
                    first = index % len(order)
                    for name in order[first:] + order[:first]:
                        reference_ms.append(self.backend.reference_ms())
                        for engine in ENGINES:
                            session, feed = engines[name, engine]
                            begin = time.perf_counter()
                            session.run(None, feed)
                            if index >= WARMUP:
                                wall_ms[name][engine].append(1e3 * (time.perf_counter() - begin))
                for engine, (session, _) in engines.items():
                    add_kernel_times(kernels.setdefault(engine, {}), session.end_profiling())
                del engines, session
        return [
            {
                "kernels_ms": {engine: kernels_ms(kernels[name, engine]) for engine in ENGINES},
                "wall_ms": wall_ms[name],
                "reference_ms": reference_ms,
            }
            for name in names
        ]

    def _export(self, structure: Structure, name: str) -> None:
        pruned = apply_plan(copy.deepcopy(self.dense), plan_of_structure(self.space, structure))
        self.adapter.export(pruned, self.folder / name, plan_hash=name, weights="random")
        del pruned
        gc.collect()


def profiled_session(path: Path, profile: Path) -> tuple[ort.InferenceSession, dict[str, np.ndarray]]:
    """A session on one thread under the profiler, and random inputs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.set_denormal_as_zero", "1")  # as deployed
    options.enable_profiling = True
    options.profile_file_prefix = str(profile)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    return session, {i.name: random.standard_normal(i.shape, dtype=np.float32) for i in session.get_inputs()}


def add_kernel_times(times: dict[Kernel, list[float]], profile: str) -> None:
    """Add the milliseconds of every kernel in every run of a profile."""
    for event in json.loads(Path(profile).read_text()):
        if event["name"].endswith("_kernel_time"):
            times.setdefault((event["name"], event["args"]["node_index"]), []).append(event["dur"] / 1000)


def kernels_ms(times: dict[Kernel, list[float]]) -> float:
    """Sum over kernels of the median of the fastest three runs."""
    return sum(statistics.median(sorted(values)[:3]) for values in times.values())


def relative_ms(runs: list[Run], times: Callable[[Run], dict[str, float]]) -> list[dict[str, float]]:
    """Milliseconds per engine of each run, in terms of the dense network of the first group."""
    first = times(runs[0][DENSE])
    result = []
    for run in runs:
        own, dense = times(run), times(run[DENSE])
        result.append({engine: own[engine] * first[engine] / dense[engine] for engine in ENGINES})
    return result


def fastest_kernels_ms(run: Run) -> dict[str, float]:
    """Per engine the sum over kernels of the median of the fastest three runs."""
    return run["kernels_ms"]


def fastest_runs_ms(run: Run) -> dict[str, float]:
    """Per engine the median of the three fastest runs by the wall clock."""
    return {engine: statistics.median(sorted(times)[:3]) for engine, times in run["wall_ms"].items()}


def extreme_structures(
    space: PruningSpace, model: LatencyModel, macs: LatencyModel, pool: int, count: int
) -> list[Structure]:
    """Largest and smallest predicted latency per multiply-accumulate of ``pool`` random structures."""
    drawn = [random_structure(space, POOL_SEED + index, skew=index % 2 == 0) for index in range(pool)]
    drawn.sort(key=lambda s: model.predict(s.widths, s.removed) / macs.predict(s.widths, s.removed))
    return drawn[: count // 2] + drawn[len(drawn) - (count - count // 2) :]


def figures(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Mean and worst relative error, rank correlation, share of pairs 2 % apart that are ordered rightly."""
    error = np.abs(predicted / measured - 1)
    pairs = [
        (i, j)
        for i, j in combinations(range(len(measured)), 2)
        if abs(measured[i] - measured[j]) > 0.02 * min(measured[i], measured[j])
    ]
    right = [(predicted[i] < predicted[j]) == (measured[i] < measured[j]) for i, j in pairs]
    return {
        "mean_error": float(error.mean()),
        "worst_error": float(error.max()),
        "rank_correlation": float(spearmanr(predicted, measured).statistic),
        "pairwise": statistics.fmean(right) if right else 1.0,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="e.g. configs/streampetr_mdp.py")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/latency_prediction"))
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--skewed", type=int, default=20)
    parser.add_argument("--extreme", type=int, default=12)
    parser.add_argument("--pool", type=int, default=1500, help="structures that the extreme ones are taken from")
    parser.add_argument("--loads", type=int, default=4, help="how often every group is loaded")
    parser.add_argument("--rounds", type=int, default=4, help="timed rounds per load")
    parser.add_argument("--groups", type=int, help="stop after this many more groups of networks; run again to go on")
    parser.add_argument("--exact", action="store_true", help="also predict with every used entry measured")
    parser.add_argument("--space", type=Path, nargs="+", default=[], help="also predict with the terms of these spaces")
    parser.add_argument("--json", type=Path, help="write the figures and each structure's times here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    console = Console(soft_wrap=True)
    MMLogger.get_instance("mdp", log_level="WARNING")  # initialisers are talkative
    config = Config.fromfile(args.config)
    s = PruneSettings.from_config(config.get("prune", {}))
    adapter = adapter_of(config, s.input_shape, s.adapter)
    dense, weights = adapter.build(None)
    space = adapter.trace(dense, s.space_options)
    backend, table_path = OnnxRuntimeBackend(), args.work_dir / "latency_table.json"
    others = {path.stem: PruningSpace.load(path) for path in args.space}
    for name, other in others.items():
        if other.by_name != space.by_name or other.blocks_by_name != space.blocks_by_name:
            raise MdpError(f"--space {name}: its dimensions or blocks are not those of {args.config}")
        measure_latency(other, backend, table_path)
    table = measure_latency(space, backend, table_path)

    fitted = fit_structures(space, FITTED)
    sets = {
        "random": [random_structure(space, RANDOM_SEED + i) for i in range(args.random)],
        "skewed": [random_structure(space, SKEWED_SEED + i, skew=True) for i in range(args.skewed)],
    }
    ones = {engine: 1.0 for engine in ENGINES}
    zeros = dict.fromkeys(ones, 0.0)
    macs_table = MacsTable(table.device, table.protocol)
    sets["extreme"] = extreme_structures(
        space,
        LatencyModel(space, table, zeros, ones),
        LatencyModel(space, macs_table, zeros, ones),
        args.pool,
        args.extreme,
    )
    structures = fitted + [structure for chosen in sets.values() for structure in chosen]

    dense_path = args.work_dir / DENSE
    if not dense_path.exists():
        adapter.export(dense, dense_path, plan_hash=None, weights=weights)
    whole = Whole(dense, space, backend, adapter, args.work_dir, args.loads, args.rounds, console)
    runs = whole.measure(structures, args.work_dir / "whole.json", args.groups)
    if runs is None:
        return
    kernels, walls = (
        [MeasuredNetwork(s.widths, s.removed, ms) for s, ms in zip(structures, times, strict=True)]
        for times in (relative_ms(runs, fastest_kernels_ms), relative_ms(runs, fastest_runs_ms))
    )
    drift = [sum(run[DENSE]["kernels_ms"].values()) for run in runs[::GROUP]]

    tables: dict[str, LatencyTable] = {"table": table}
    if args.exact:
        used = [key for structure in structures for key in entries_of(space, structure.widths, structure.removed)]
        exact = measure_latency(space, backend, args.work_dir / "latency_table_exact.json", extra=used)
        tables["table, exact"] = exact
    tables |= {"HALP": HalpTable(table), "MACs": macs_table}
    result: dict[str, Any] = {
        "device": str(table.device),
        "disturbed_entries": len(table.disturbed()),
        "dense_ms_per_group": drift,
        "reference_ms": quartiles([ms for run in runs for ms in run["reference_ms"]]),
    }
    for key, title, networks in (
        ("sets", "sum of the fastest kernels", kernels),
        ("sets_wall_clock", "fastest runs by the wall clock", walls),
    ):
        models = {name: LatencyModel.fit(space, one, networks[:FITTED]) for name, one in tables.items()}
        models |= {name: LatencyModel.fit(other, table, networks[:FITTED]) for name, other in others.items()}
        for name, model in models.items():
            for line in model.explanation:
                console.print(f"{name}: {line}", highlight=False)
        result[key] = report(title, sets, networks[FITTED:], models, console)
    result["fit"] = {
        "kernels_ms": [p.engines_ms for p in kernels[:FITTED]],
        "wall_ms": [p.engines_ms for p in walls[:FITTED]],
    }
    console.print(
        f"{table.device}; {result['disturbed_entries']} of {len(table)} table entries were measured while "
        f"the machine was busy; reference operator (quartiles) {result['reference_ms']} ms; dense network in "
        f"each group {[round(ms) for ms in drift]} ms",
        highlight=False,
    )
    if args.json is not None:
        write_json(args.json, result)


def quartiles(values: list[float]) -> list[float]:
    """Smallest, quartiles, largest."""
    return [round(float(value), 3) for value in np.percentile(values, [0, 25, 50, 75, 100])]


def report(
    title: str,
    sets: dict[str, list[Structure]],
    networks: list[MeasuredNetwork],
    models: dict[str, LatencyModel],
    console: Console,
) -> dict[str, Any]:
    """Print one row per set and model; returns the figures and each structure's times."""
    shown = Table(
        "set",
        "model",
        "structures",
        "mean error",
        "worst error",
        "rank correlation",
        "pairs ordered",
        title=f"measured: {title}",
    )
    result: dict[str, Any] = {}
    percent: Callable[[float], str] = lambda value: f"{100 * value:.1f} %"  # noqa: E731
    rest = iter(networks)
    for name, structures in sets.items():
        mine = [next(rest) for _ in structures]
        measured = np.array([sum(network.engines_ms.values()) for network in mine])
        result[name] = {}
        for label, model in models.items():
            predicted = np.array([model.predict(s.widths, s.removed) for s in structures])
            row = figures(predicted, measured)
            result[name][label] = {**row, "predicted_ms": predicted.tolist(), "measured_ms": measured.tolist()}
            shown.add_row(
                name,
                label,
                str(len(structures)),
                percent(row["mean_error"]),
                percent(row["worst_error"]),
                f"{row['rank_correlation']:.3f}",
                percent(row["pairwise"]),
            )
    console.print(shown)
    return result


if __name__ == "__main__":
    main()
