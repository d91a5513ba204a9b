"""How well do latency models predict whole engines? Predicted against measured on structures outside the fit.

Three sets of structures: random, skewed (lopsided widths, many blocks removed) and extreme (largest and smallest
predicted latency per multiply-accumulate of many). Three models: the latency table, HALP's (latency depends on the
output width only, inputs stay dense) and multiply-accumulates times a factor, each fitted to the same few structures.
Structures are measured in groups beside the dense model; rounds during which the machine was busy do not count. On a
machine that is never idle, --kernels adds up the fastest run of each kernel instead: every kernel finds its own quiet
moment, and all structures gain by it alike.
"""
from __future__ import annotations

import argparse
import copy
import gc
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import onnxruntime as ort
from mmengine.config import Config
from mmengine.logging import MMLogger
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import nn

from mdp_mmdet3d.deploy.manifest import MANIFEST_FILE
from mdp_mmdet3d.deploy.measure import settled
from mdp_mmdet3d.deploy.stream import StreamRunner
from mdp_mmdet3d.deploy.streampetr import export_streampetr
from mdp_mmdet3d.deploy.synthetic import synthetic_frames
from mdp_mmdet3d.engine.inputs import build_dense
from mdp_mmdet3d.engine.settings import PruneSettings
from mdp_mmdet3d.engine.wholes import plan_of_structure
from mdp_mmdet3d.files import write_json
from mdp_mmdet3d.latency import (
    LatencyModel,
    LatencyTable,
    Lookup,
    Measured,
    Structure,
    calibration_structures,
    entries_of,
)
from mdp_mmdet3d.latency.backends.onnxruntime import OnnxRuntimeBackend
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.structures import random_structure
from mdp_mmdet3d.latency.table import DISTURBED
from mdp_mmdet3d.latency.work import operator_work
from mdp_mmdet3d.space import OperatorSignature, PruningSpace
from mdp_mmdet3d.space.trace import trace_space
from mdp_mmdet3d.surgery.apply import apply_plan

Sample = tuple[float, float, float]  # milliseconds of the reference operator beside it, of the encoder, of the head
STAGES = ("image_encoder", "head")
CALIBRATION = 6
WARMUP = 2
GROUP = 7  # structures that are measured side by side with the dense one
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
        return Lookup(operator_work(signature, widths).macs * 1e-9, interpolated=False)


@dataclass
class Whole:
    """Exports and measures whole networks in groups, each together with the dense one."""

    dense: nn.Module
    space: PruningSpace
    backend: OnnxRuntimeBackend
    class_names: list[str]
    folder: Path
    rounds: int
    kernels: bool
    console: Console
    samples: list[dict[str, list[Sample]]] = field(default_factory=list)

    def measure(self, structures: list[Structure], cache: Path, groups: int | None = None) -> list[Measured] | None:
        """Milliseconds per engine, relative to the dense network of the first group; resumable per group.

        Returns:
            One measurement per structure, or None if ``groups`` more groups were not enough.
        """
        done: list[dict[str, list[Sample]]] = json.loads(cache.read_text()) if cache.exists() else []
        for index in range(len(done), -(-len(structures) // GROUP))[:groups]:
            group = structures[index * GROUP:(index + 1) * GROUP]
            names = [f"s{index * GROUP + i}" for i in range(len(group))]
            for name, structure in zip(names, group, strict=True):
                self._export(structure, name)
            done.append(self._fastest_kernels(names) if self.kernels else self._interleaved(["dense", *names]))
            write_json(cache, done)
            for name in names:
                shutil.rmtree(self.folder / name)
            self.console.print(f"measured {index * GROUP + len(group)} of {len(structures)} structures",
                               highlight=False)
        if len(done) * GROUP < len(structures):
            return None
        self.samples = done
        return [Measured(s.widths, s.removed, stages_ms)
                for s, stages_ms in zip(structures, relative_times(done), strict=True)]

    def _interleaved(self, names: list[str]) -> dict[str, list[Sample]]:
        """Every round of every network."""
        runners = {name: StreamRunner(self.folder / name) for name in names}
        frame = synthetic_frames(runners["dense"].manifest, 1)[0]
        samples: dict[str, list[Sample]] = {name: [] for name in names}
        for runner in runners.values():
            runner.set_rig(frame.intrinsics, frame.lidar2img)
        before = self.backend.reference_ms()
        for index in range(WARMUP + self.rounds):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                runners[name].reset()
                output = runners[name].step(frame)
                after = self.backend.reference_ms()
                if index >= WARMUP:
                    samples[name].append((max(before, after), output.encoder_ms, output.head_ms))
                before = after
        return samples

    def _fastest_kernels(self, names: list[str]) -> dict[str, list[Sample]]:
        """Sum over kernels of the fastest of all rounds; needs no comparison to the dense network."""
        encoder, head = ({name: fastest_kernels_ms(self.folder / name / f"{stage}.onnx", WARMUP + self.rounds)
                          for name in names} for stage in STAGES)
        return {"dense": [(1.0, 1.0, 1.0)], **{name: [(1.0, encoder[name], head[name])] for name in names}}

    def _export(self, structure: Structure, name: str) -> None:
        slim = apply_plan(copy.deepcopy(self.dense), plan_of_structure(self.space, structure))
        export_streampetr(slim, self.folder / name, class_names=self.class_names, plan_hash=name,
                          weights="random")
        del slim
        gc.collect()


def relative_times(groups: list[dict[str, list[Sample]]]) -> list[dict[str, float]]:
    """Milliseconds per engine of each structure, in terms of the dense network of the first group."""
    first = settled_ms(groups[0], "dense")
    result = []
    for group in groups:
        dense = settled_ms(group, "dense")
        for name in group:
            if name != "dense":
                own = settled_ms(group, name)
                result.append({stage: own[stage] * first[stage] / dense[stage] for stage in STAGES})
    return result


def settled_ms(group: dict[str, list[Sample]], name: str) -> dict[str, float]:
    """Settled milliseconds per engine, of the rounds whose reference operator was not disturbed, 4 at least."""
    idle = min(sample[0] for rows in group.values() for sample in rows)
    rows = sorted(tuple(row) for row in group[name])
    quiet = rows[:max(sum(row[0] <= DISTURBED * idle for row in rows), min(4, len(rows)))]
    return {stage: settled([row[i] for row in quiet]) for i, stage in enumerate(STAGES, start=1)}


def quiet_share(groups: list[dict[str, list[Sample]]]) -> float:
    """Share of the runs of whole networks during which the machine did nothing else."""
    idle = min(sample[0] for group in groups for rows in group.values() for sample in rows)
    return statistics.fmean(sample[0] <= DISTURBED * idle for group in groups for rows in group.values()
                            for sample in rows)


def fastest_kernels_ms(path: Path, rounds: int) -> float:
    """Run a model on random inputs under ONNX Runtime's profiler and add up the fastest run of each kernel."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        random = np.random.default_rng(0)
        feed = {i.name: random.standard_normal(i.shape, dtype=np.float32) for i in session.get_inputs()}
        for _ in range(rounds):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    fastest: dict[str, float] = {}
    for event in events:
        if event["name"].endswith("_kernel_time"):
            fastest[event["name"]] = min(event["dur"] / 1000, fastest.get(event["name"], np.inf))
    return sum(fastest.values())


def extreme_structures(space: PruningSpace, model: LatencyModel, macs: LatencyModel, pool: int,
                       count: int) -> list[Structure]:
    """Largest and smallest predicted latency per multiply-accumulate of ``pool`` random structures."""
    drawn = [random_structure(space, POOL_SEED + index, skew=index % 2 == 0) for index in range(pool)]
    drawn.sort(key=lambda s: model.predict(s.widths, s.removed) / macs.predict(s.widths, s.removed))
    return drawn[: count // 2] + drawn[len(drawn) - (count - count // 2):]


def figures(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Mean and worst relative error, rank correlation, share of pairs 2 % apart that are ordered rightly."""
    error = np.abs(predicted / measured - 1)
    pairs = [(i, j) for i, j in combinations(range(len(measured)), 2)
             if abs(measured[i] - measured[j]) > 0.02 * min(measured[i], measured[j])]
    right = [(predicted[i] < predicted[j]) == (measured[i] < measured[j]) for i, j in pairs]
    return {"mean_error": float(error.mean()), "worst_error": float(error.max()),
            "rank_correlation": float(spearmanr(predicted, measured).statistic),
            "pairwise": statistics.fmean(right) if right else 1.0}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="e.g. configs/streampetr_mdp.py")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/latency_prediction"))
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--skewed", type=int, default=20)
    parser.add_argument("--extreme", type=int, default=12)
    parser.add_argument("--pool", type=int, default=1500, help="structures that the extreme ones are taken from")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--groups", type=int, help="stop after this many more groups of networks; run again to go on")
    parser.add_argument("--kernels", action="store_true", help="add up kernels, for a machine that is never idle")
    parser.add_argument("--exact", action="store_true", help="also predict with every used entry measured")
    parser.add_argument("--json", type=Path, help="write the figures and each structure's times here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    console = Console(soft_wrap=True)
    MMLogger.get_instance("mdp", log_level="WARNING")  # initialisers are talkative
    config = Config.fromfile(args.config)
    s = PruneSettings.from_config(config.get("prune", {}))
    dense, weights = build_dense(config, None)
    space = trace_space(dense, s.input_shape, s.space_options)
    backend, table_path = OnnxRuntimeBackend(), args.work_dir / "latency_table.json"
    table = measure_latency(space, backend, table_path)

    calibration = calibration_structures(space, CALIBRATION)
    sets = {"random": [random_structure(space, RANDOM_SEED + i) for i in range(args.random)],
            "skewed": [random_structure(space, SKEWED_SEED + i, skew=True) for i in range(args.skewed)]}
    ones = {stage: 1.0 for stage in STAGES}
    zeros = dict.fromkeys(ones, 0.0)
    macs_table = MacsTable(table.device, table.protocol)
    sets["extreme"] = extreme_structures(space, LatencyModel(space, table, zeros, ones),
                                         LatencyModel(space, macs_table, zeros, ones), args.pool, args.extreme)
    structures = calibration + [structure for chosen in sets.values() for structure in chosen]

    if not (args.work_dir / "dense" / MANIFEST_FILE).exists():
        export_streampetr(dense, args.work_dir / "dense", class_names=list(config.class_names), weights=weights)
    whole = Whole(dense, space, backend, list(config.class_names), args.work_dir, args.rounds, args.kernels, console)
    points = whole.measure(structures, args.work_dir / "whole.json", args.groups)
    if points is None:
        return

    tables: dict[str, LatencyTable] = {"table": table}
    if args.exact:
        used = [point for structure in structures for point in entries_of(space, structure.widths, structure.removed)]
        exact = measure_latency(space, backend, args.work_dir / "latency_table_exact.json", extra=used)
        tables["table, exact"] = exact
    tables |= {"HALP": HalpTable(table), "MACs": macs_table}
    models = {name: LatencyModel.fit(space, one, points[:CALIBRATION]) for name, one in tables.items()}
    for name, model in models.items():
        for line in model.explanation:
            console.print(f"{name}: {line}", highlight=False)
    quiet = quiet_share(whole.samples)
    console.print(f"the machine was idle during {quiet:.0%} of the runs of whole networks", highlight=False)
    report(sets, points[CALIBRATION:], models, len(table.disturbed()), args.json, console)


def report(sets: dict[str, list[Structure]], points: list[Measured], models: dict[str, LatencyModel], disturbed: int,
           path: Path | None, console: Console) -> None:
    """Print one row per set and model, and write everything to ``path``."""
    shown = Table("set", "model", "structures", "mean error", "worst error", "rank correlation", "pairs ordered")
    result: dict[str, dict] = {}
    percent: Callable[[float], str] = lambda value: f"{100 * value:.1f} %"  # noqa: E731
    rest = iter(points)
    for name, structures in sets.items():
        mine = [next(rest) for _ in structures]
        measured = np.array([sum(point.stages_ms.values()) for point in mine])
        result[name] = {}
        for label, model in models.items():
            predicted = np.array([model.predict(s.widths, s.removed) for s in structures])
            row = figures(predicted, measured)
            result[name][label] = {**row, "predicted_ms": predicted.tolist(), "measured_ms": measured.tolist()}
            shown.add_row(name, label, str(len(structures)), percent(row["mean_error"]), percent(row["worst_error"]),
                          f"{row['rank_correlation']:.3f}", percent(row["pairwise"]))
    console.print(shown)
    device = next(iter(models.values())).table.device
    console.print(f"{device}; {disturbed} table entries were measured while the machine was busy", highlight=False)
    if path is not None:
        write_json(path, {"device": str(device), "disturbed_entries": disturbed, "sets": result})


if __name__ == "__main__":
    main()
