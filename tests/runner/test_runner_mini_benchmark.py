"""benchmarks/mini_nuscenes.py: equal measured latency, uniform pruning, runs in processes of their own, figures."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mdp_mmdet3d.compare import tuning
from mdp_mmdet3d.errors import InfeasibleBudgetError, MdpError
from mdp_mmdet3d.files import write_json
from mdp_mmdet3d.runner.settings import FinetuneSettings
from mdp_mmdet3d.solver import ProblemDimension, ProblemTerm, PruningProblem
from mdp_mmdet3d.solver.baselines import uniform_path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "mini_nuscenes.py"
CONFIG = str(ROOT / "configs" / "streampetr_mini_mdp.py")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("mini_nuscenes_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class FakePlan:
    width: float

    @property
    def hash(self) -> str:
        return str(self.width)


@pytest.mark.parametrize("wrong", [lambda x: x, lambda x: 0.3 + 0.7 * x, lambda x: x**2, lambda x: 1.6 * x])
@pytest.mark.parametrize("share", [0.4, 0.55, 0.7])
def test_the_knob_is_turned_until_the_measured_latency_is_right(bench, wrong, share):
    found = tuning.tune(FakePlan, lambda plan: wrong(plan.width), share)
    assert found.share == pytest.approx(share, rel=tuning.CLOSE)
    assert found.share == wrong(found.plan.width) and len(found.tries) <= tuning.TRIES


def test_of_a_few_plans_the_nearest_one_is_taken_and_each_is_measured_once(bench):
    steps, measured = (0.2, 0.38, 0.47, 0.61, 0.9), []

    def propose(knob):
        if knob < 0.3:
            raise InfeasibleBudgetError("too small", 0.3)
        return FakePlan(min(steps, key=lambda step: abs(step - 0.8 * knob)))

    def measure(plan):
        measured.append(plan.width)
        return plan.width

    found = tuning.tune(propose, measure, 0.55)
    assert found.plan.width == 0.61 and len(measured) == len(set(measured))
    assert tuning.tune(propose, lambda plan: plan.width, 0.4).plan.width == 0.38

    def never(knob):
        raise InfeasibleBudgetError("too small", 1.0)

    with pytest.raises(MdpError, match=r"no plan at 0\.4 of the dense latency"):
        tuning.tune(never, measure, 0.4)


def test_uniform_pruning_narrows_all_dimensions_alike():
    dimensions = (
        ProblemDimension("a", (8, 16, 24, 32)),
        ProblemDimension("b", (1, 2, 3, 4, 5, 6, 7, 8)),
        ProblemDimension("c", (64, 128)),
    )
    terms = tuple(
        ProblemTerm(d.name, (i,), None, {"latency_ms": np.array(d.options, float)}) for i, d in enumerate(dimensions)
    )
    path = uniform_path(PruningProblem("p", ("latency_ms",), dimensions, (), terms))
    assert path[0].options == (3, 7, 1) and path[-1].options == (0, 0, 0)
    assert len(path) == 1 + 3 + 7 + 1
    for before, after in itertools.pairwise(path):
        change = np.subtract(before.options, after.options)
        assert change.sum() == 1 and change.min() == 0
    for plan in path:
        ratios = [d.options[k] / d.options[-1] for d, k in zip(dimensions, plan.options)]
        # Nothing is cut below what the widest could still give up: at most one step of the coarsest grid apart.
        assert max(r for r, k in zip(ratios, plan.options) if k or r == max(ratios)) - min(ratios) <= 0.5 + 1e-9


def accuracy(path: Path, mean_ap: float, **more) -> Path:
    write_json(path, {"schema_version": 1, "figures": {"mAP": mean_ap, "NDS": mean_ap / 2}, **more})
    return path


def test_figures_and_verdicts(bench, tmp_path):
    def entry(*values):
        return {"finetuned": bench.summary([accuracy(tmp_path / f"{v}.json", v) for v in values])}

    figures = entry(0.30, 0.34, 0.32)["finetuned"]["mAP"]
    assert figures["mean"] == pytest.approx(0.32) and figures["std"] == pytest.approx(0.02)
    assert figures["spread"] == pytest.approx(0.04) and figures["runs"] == [0.30, 0.34, 0.32]
    assert entry(0.3)["finetuned"]["NDS"] == {"runs": [0.15], "mean": 0.15, "std": 0.0, "spread": 0.0}
    report = {
        "dense": entry(0.40, 0.42),
        "shares": {
            "0.7": {"mdp": entry(0.39, 0.40), "halp": entry(0.38, 0.385), "uniform": entry(0.2, 0.2)},
            "0.4": {"mdp": entry(0.20, 0.21), "halp": entry(0.30, 0.31), "uniform": entry(0.1, 0.1)},
        },
    }
    found = bench.verdicts(report)
    assert found["0.7"]["mdp_minus_halp"] == pytest.approx(0.0125)
    assert found["0.7"]["not_below_dense_by_more_than_the_spread"] is True
    assert found["0.4"]["mdp_minus_halp"] == pytest.approx(-0.1)
    assert found["0.4"]["not_below_dense_by_more_than_the_spread"] is False


def test_steps_run_in_their_own_processes_and_are_kept(bench, tmp_path, monkeypatch):
    script = tmp_path / "step.py"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[1]); step = json.loads((folder / 'step.json').read_text())\n"
        "seed = (step['finetune'] or {}).get('seed')\n"
        "sys.exit('broken') if seed == 7 else None\n"
        "(folder / 'accuracy.json').write_text(json.dumps(dict(schema_version=1, seed=seed,\n"
        "    identity=step['identity'], mAP=0.5, NDS=0.5, cores=sorted(os.sched_getaffinity(0)), pid=os.getpid())))\n"
    )
    monkeypatch.setattr(sys.modules[bench.Steps.__module__], "__file__", str(script))
    weights = "w"
    core = min(os.sched_getaffinity(0))

    def run(*seeds):
        steps = bench.Steps(tmp_path / "steps", CONFIG, "dense.pth", weights, FinetuneSettings(3), QUIET)
        results = [steps.add(f"dense_{seed}", None, seed) for seed in seeds]
        steps.work_on(core)
        steps.finish()
        return steps.added, [json.loads(path.read_text()) for path in results]

    added, first = run(None, 0, 1)
    assert added == 3 and [item["seed"] for item in first] == [None, 0, 1]
    assert all(item["cores"] == [core] for item in first)
    assert len({item["pid"] for item in first} | {os.getpid()}) == 4
    assert run(None, 0, 1) == (0, first)
    weights = "others"
    assert run(0)[0] == 1
    with pytest.raises(MdpError, match=r"1 of 2 steps failed, the first: .*dense_7/log\.txt"):
        run(7, 2)
    assert "broken" in (tmp_path / "steps/dense_7/log.txt").read_text()
    assert run(2)[0] == 0
