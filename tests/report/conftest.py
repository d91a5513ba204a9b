from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.latency.backends.fake import FakeBackend
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.predict import LatencyModel, MeasuredNetwork
from mdp_mmdet3d.latency.structures import fit_structures
from mdp_mmdet3d.report.provenance import provenance
from mdp_mmdet3d.report.summary import build_report
from mdp_mmdet3d.runner.networks import save_networks
from mdp_mmdet3d.runner.optimise import PlanSearch
from mdp_mmdet3d.space import NotPrunable
from mdp_mmdet3d.space.types import PruningSpace, ScoreSource, TensorAxis

sys.path.insert(0, str(Path(__file__).parents[1] / "latency"))
from latency_spaces import small_space


def space_with_sources() -> PruningSpace:
    """The small space with names as modules have, and something to lose in every dimension."""
    space = small_space()
    attention = "head.layer.attention"
    owner = {"inner": "net.block", "heads": attention, "qk": attention, "v": attention}
    path = {"block": "net.block", "layer": "head.layer", "layer.attention": attention, "layer.ffn": "head.layer.ffn"}
    dimensions = tuple(
        replace(
            d,
            members=(TensorAxis(f"{owner.get(d.name, 'net')}.{d.name}", 0),),
            sources=(ScoreSource((), owner.get(d.name)),),
        )
        for d in space.dimensions
        if d.name != "rig"
    )
    terms = tuple(replace(t, block=t.block and path[t.block]) for t in space.terms if t.engine != "position_embedding")
    blocks = tuple(replace(b, name=path[b.name], parent=b.parent and path[b.parent]) for b in space.blocks)
    fixed = (NotPrunable("head.norm", "its width is <that> of the queries"),)
    return replace(space, dimensions=dimensions, terms=terms, blocks=blocks, not_prunable=fixed)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Work directory of a finished run: everything that the report reads, found by the real search."""
    folder = tmp_path / "run"
    space = space_with_sources()
    space.save(folder / "space.json")
    rng = np.random.default_rng(0)
    scores = {d.name: {d.sources[0].block: rng.uniform(0.1, 1.0, (d.copies, d.size))} for d in space.dimensions}
    importance = ImportanceTable(space.model_digest, "random", 4, 0, 4, scores, "none")
    table = measure_latency(space, FakeBackend(), folder / "latency_table.json", policy="exact", progress=False)
    sums = LatencyModel(space, table, {"image_encoder": 0.01, "head": 0.005}, {"image_encoder": 1.1, "head": 0.9})
    networks = [
        MeasuredNetwork(dict(s.widths), tuple(sorted(s.removed)), sums.predict_engines(s.widths, s.removed))
        for s in fit_structures(space, 3)
    ]
    save_networks(folder / "whole_latency.json", {"fingerprint": space.model_digest}, networks)
    latency = LatencyModel.fit(space, table, networks)
    dense_ms = latency.predict({})
    search = PlanSearch(space, importance, latency, None, None, 0.6 * dense_ms, 60.0)
    plan = search.solve()
    plan.save(folder / "plan.json")
    search.solution.problem.save(folder / "problem.npz")
    figures = {
        name: {
            "latency_ms": factor * ms,
            "median_ms": 1.05 * factor * ms,
            "p90_ms": 1.2 * factor * ms,
            "engines_ms": {"image_encoder": 0.6 * ms, "head": 0.4 * ms},
            "predicted_ms": ms,
            "fps": 1e3 / ms,
            "params": params,
            "macs": 10 * params,
        }
        for name, ms, factor, params in (
            ("dense", dense_ms, 1.01, 2_000_000),
            ("pruned", search.predicted_ms, 0.99, 1_234_567),
        )
    }
    report = build_report(
        space=space,
        importance=importance,
        plan=plan,
        solution=search.solution,
        figures=figures,
        seconds={"solve": 1.5},
        budget=0.6,
        budget_ms=0.6 * dense_ms,
        reference_budget_ms=0.6 * dense_ms,
        session_drift=1.02,
        measured_end_to_end=True,
        speedup=1.6543,
        not_prunable_ms=latency.total_fixed_ms,
        interpolated_entries=0,
        interpolated=[],
        corrections=1,
        fitted_networks=3,
        latency_model=list(latency.explanation),
        breakdown_ms=search.breakdown(),
        differences={"dense": {"outputs": 1e-6}, "pruned": {"outputs": 2e-6}},
        weights="random",
        device={
            "processor": "fake processor",
            "runtime": "fake",
            "runtime_version": "1",
            "threads": 1,
            "precision": "float32",
        },
        latency_table=None,
        provenance=provenance("python tools/prune.py configs/x.py --budget 0.6", "configs/x.py", None, {"budget": 0.6}),
        accuracy={
            "dense": {"mAP": 0.61},
            "pruned": {"mAP": 0.02},
            "repaired": {"mAP": 0.31},
            "finetuned": {"mAP": 0.53},
        },
    )
    (folder / "report.json").write_text(json.dumps(report))
    return folder
