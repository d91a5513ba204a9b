"""What methods propose, work in processes of its own, figures and verdicts, bad input: tools/compare.py in parts."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from rich.console import Console
from torch import nn

from mdp_mmdet3d.adapters import SingleGraph
from mdp_mmdet3d.compare import methods, report
from mdp_mmdet3d.compare.checks import different_budgets, tuned_plan
from mdp_mmdet3d.compare.job import Comparison
from mdp_mmdet3d.compare.magnitude import magnitude_importance
from mdp_mmdet3d.compare.recipe import finetune_settings
from mdp_mmdet3d.compare.steps import Steps
from mdp_mmdet3d.compare.time_left import TimeLeft
from mdp_mmdet3d.compare.torch_pruning import torch_pruning_plan
from mdp_mmdet3d.compare.tuning import NoPlanError
from mdp_mmdet3d.errors import FileFormatError, MdpError, MissingExtraError
from mdp_mmdet3d.files import write_json
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.latency.backends.fake import FakeBackend
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.predict import LatencyModel
from mdp_mmdet3d.runner.settings import FinetuneSettings
from mdp_mmdet3d.solver import ProblemDimension, ProblemTerm, PruningProblem
from mdp_mmdet3d.solver.baselines import uniform_path
from mdp_mmdet3d.space.builder import InputShape, SpaceOptions
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.plan import PruningPlan

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "streampetr_mini_mdp.py")
QUIET = Console(quiet=True)


class Net(nn.Module):
    """Three convolutions; the norm of a channel of `a` grows with its number, that of `b` falls."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.b = nn.Conv2d(32, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 4, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(1.0)
            self.a.weight.mul_(torch.linspace(0.1, 2.0, 32).view(-1, 1, 1, 1))
            self.b.weight.mul_(torch.linspace(2.0, 0.1, 16).view(-1, 1, 1, 1))

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return self.c(self.b(self.norm(self.a(inputs)).relu()).relu())


@pytest.fixture(scope="module")
def traced():
    adapter = SingleGraph(Config(), InputShape(1, 64, 64))
    model = Net().eval()
    return adapter, model, adapter.trace(model, SpaceOptions(8, 4))


def test_magnitude_is_the_norm_of_an_elements_group(traced):
    _, model, space = traced
    table = magnitude_importance(model, space, "w")
    table.check(space)
    found = table.total("a.out")[0]
    a, b = model.a.weight.detach(), model.b.weight.detach()
    squares = a.square().sum(dim=(1, 2, 3)) + b.square().sum(dim=(0, 2, 3)) + 2  # gamma and beta of the norm are 1
    expected = squares.sqrt().numpy()
    np.testing.assert_allclose(found, expected / expected.mean(), rtol=1e-5)
    assert (np.diff(table.total("b.out")[0]) < 0).all()


def test_torch_pruning_cuts_what_it_ranks_lowest_and_the_plan_says_it(traced):
    adapter, model, space = traced
    plan = torch_pruning_plan(adapter, model, space, 0.5, 4)
    widths = {d.name: plan.width(d.name, d.size) for d in space.dimensions}
    assert all(width % 4 == 0 for width in widths.values()) and sum(widths.values()) <= 28
    for name, last in (("a.out", range(32)[-widths["a.out"] :]), ("b.out", range(widths["b.out"]))):
        if name in plan.cuts:
            assert plan.cuts[name].kept == (tuple(last),)
    pruned = apply_plan(Net().eval(), plan)
    assert pruned(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 8, 8)
    assert not torch_pruning_plan(adapter, model, space, 0.0, 4).cuts


def test_a_model_that_torch_pruning_fails_on_has_no_plan_of_it(traced, monkeypatch):
    adapter, model, space = traced

    def step(self, interactive):
        """As on a ViT, whose attention packs three projections."""
        raise IndexError("index 64 is out of bounds")

    monkeypatch.setattr("torch_pruning.pruner.BasePruner.step", step)
    with pytest.raises(NoPlanError, match=r"^torch-pruning fails on .*: IndexError: index 64 is out of bounds$"):
        torch_pruning_plan(adapter, model, space, 0.5, 4)


def test_torch_pruning_needs_one_graph(traced):
    _, model, space = traced
    with pytest.raises(MdpError, match="traces one graph on images, which Net is not"):
        torch_pruning_plan(object(), model, space, 0.5, 4)


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


class Block(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(64, 64, 3, padding=1)
        self.b = nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x):
        return x + self.b(self.a(x).relu())


class Residual(nn.Module):
    """A stem and two residual blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block())
        self.last = nn.Conv2d(64, 4, 1)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return self.last(self.blocks(self.stem(inputs).relu()))


def test_ablation_keeps_blocks_or_adds_up_what_each_count_saves(tmp_path):
    adapter = SingleGraph(Config(), InputShape(1, 64, 64))
    model = Residual().eval()
    space = adapter.trace(model, SpaceOptions(8, 8))
    assert len(space.blocks) == 2
    scores = {
        d.name: {s.block: np.linspace(1, 2, d.size)[None] * (0.01 if s.block == "blocks.1" else 1) for s in d.sources}
        for d in space.dimensions
    }
    importance = ImportanceTable(space.model_digest, "w", 1, 0, 1, scores, "none")
    table = measure_latency(space, FakeBackend(), tmp_path / "table.json", policy="exact", progress=False)
    latency = LatencyModel.from_dense(space, table, {"model": 10.0})
    path = tmp_path / "table.json"
    material = methods.Material(
        adapter, model, "w", space, importance, latency, FakeBackend(), path, 10.0, 60.0, None, 8, print
    )
    plans = {name: method.start(material)(0.6) for name, method in methods.METHODS.items() if "mdp-" in name}
    milliseconds = {name: latency.predict(plan.widths(space), set(plan.removed)) for name, plan in plans.items()}
    assert plans["mdp-taylor"].removed and milliseconds["mdp-taylor"] <= 6.0
    assert plans["mdp-linear"].removed
    for name in ("mdp-channels", "mdp-channels-linear"):
        assert not plans[name].removed and plans[name].cuts
    # Linear latency does not see that narrowing what comes before saves as well: the plan is faster than was asked for.
    assert milliseconds["mdp-channels-linear"] < milliseconds["mdp-channels"] <= 6.0


def accuracy(path: Path, mean_ap: float) -> Path:
    write_json(path, {"schema_version": 1, "figures": {"mAP": mean_ap, "NDS": mean_ap / 2}})
    return path


def test_figures_verdicts_table_and_plot(tmp_path):
    def entry(latency, *values):
        figures = report.summary([accuracy(tmp_path / f"{v}.json", v) for v in values])
        size = {"measured_share": latency / 10, "params": 2e6, "macs": 3e6, "removed_blocks": []}
        cut = report.summary([accuracy(tmp_path / "cut.json", 0.01)])
        return {"latency_ms": latency, **size, "cut": cut, "finetuned": figures}

    figures = entry(10, 0.30, 0.34, 0.32)["finetuned"]["mAP"]
    assert figures["mean"] == pytest.approx(0.32) and figures["std"] == pytest.approx(0.02)
    assert figures["spread"] == pytest.approx(0.04) and figures["runs"] == [0.30, 0.34, 0.32]
    assert entry(10, 0.3)["finetuned"]["NDS"] == {"runs": [0.15], "mean": 0.15, "std": 0.0, "spread": 0.0}
    found = {
        "dense": entry(10, 0.40, 0.42),
        "finetune": None,
        "budgets": {
            "0.7": {"mdp": entry(7, 0.39, 0.40), "halp": entry(7.1, 0.38, 0.385), "uniform": entry(7, 0.2, 0.2)},
            "0.4": {"mdp": entry(4, 0.20, 0.21), "halp": entry(4.1, 0.30, 0.31), "uniform": entry(5, 0.3, 0.3)},
            "0.3": {"halp": entry(3, 0.1)},
        },
        "without_plan": {"0.3": {"uniform": "no plan at 0.3 of the dense latency"}},
    }
    verdicts = found["verdicts"] = report.verdicts(found)
    assert verdicts["0.7"]["mdp_minus_halp"] == pytest.approx(0.0125) and "0.3" not in verdicts
    assert verdicts["0.7"]["not_below_dense_by_more_than_the_spread"] is True
    assert verdicts["0.4"]["mdp_minus_halp"] == pytest.approx(-0.1)
    assert verdicts["0.4"]["not_below_dense_by_more_than_the_spread"] is False
    assert verdicts["0.4"]["other_latency"] == {"uniform": 0.5} and "mdp_minus_uniform" not in verdicts["0.4"]
    table = report.markdown(found).splitlines()
    assert "0.4: not compared, since they are not as fast as MDP's 0.400: uniform 0.500" in table
    assert len({line.count("|") for line in table if line.startswith("|")}) == 1
    assert "| 0.4 | HALP | 4.1 | 0.410 | 2.000 | 3.0 | 0 | 0.010 | 0.005 | 0.305 ± 0.007 | 0.152 ± 0.004 |" in table
    assert table[-1] == "0.3: uniform: no plan at 0.3 of the dense latency"
    report.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    report.plot(json.loads((ROOT / "docs/results/mini_nuscenes.json").read_text()), tmp_path / "old.png")


def test_models_have_processes_of_their_own_and_results_are_kept(tmp_path, traced):
    script = tmp_path / "step.py"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "for folder in map(pathlib.Path, sys.argv[1:]):\n"
        "    step = json.loads((folder / 'step.json').read_text())\n"
        "    seed = (step['finetune'] or {}).get('seed')\n"
        "    sys.exit('broken') if seed == 7 else None\n"
        "    (folder / 'accuracy.json').write_text(json.dumps(dict(schema_version=1, seed=seed,\n"
        "        identity=step['identity'], cores=sorted(os.sched_getaffinity(0)), pid=os.getpid())))\n"
    )
    core = min(os.sched_getaffinity(0))
    weights = "w"
    plan = tmp_path / "plans" / "mdp_0.5"
    plan.mkdir(parents=True)
    PruningPlan.from_kept(traced[2], {}, set()).save(plan / "plan.json")

    def run(folder, *seeds):
        command = (sys.executable, str(script))
        steps = Steps(tmp_path / "steps", CONFIG, "dense.pth", weights, FinetuneSettings(3), ("mAP",), QUIET, command)
        results = [steps.add(f"{name}_{seed}", which, seed) for name, which in folder.items() for seed in seeds]
        steps.run([core])
        return sum(map(len, steps.models.values())), [json.loads(path.read_text()) for path in results]

    both = {"dense": None, "mdp": plan}
    added, first = run(both, None, 0)
    assert added == 4 and [item["seed"] for item in first] == [None, 0, None, 0]
    assert all(item["cores"] == [core] for item in first)
    assert len({item["pid"] for item in first} | {os.getpid()}) == 3 and first[0]["pid"] == first[1]["pid"]
    assert run(both, None, 0) == (0, first)
    weights = "others"
    assert run({"dense": None}, 0)[0] == 1
    with pytest.raises(MdpError, match=r"2 of 2 models failed, the first: .*mdp_0\.5\.log"):
        run({"mdp": plan, "dense": None}, 2, 7)
    assert "broken" in (tmp_path / "steps/dense.log").read_text()
    assert run({"mdp": plan, "dense": None}, 2)[0] == 0


def test_time_left_is_told_by_kind():
    left = TimeLeft()
    for kind in ("evaluation", "evaluation", "fine-tuning"):
        left.add(kind)
    assert left.sentence() == ", 2 x evaluation and 1 x fine-tuning not timed yet"
    left.end("evaluation", 10.0)
    assert left.sentence() == ", about 10 s left, 1 x fine-tuning not timed yet" and (left.ended, left.total) == (1, 3)
    left.end("fine-tuning", 500.0)
    left.add("fine-tuning")
    assert left.sentence(workers=2) == ", about 4 min left"


WHOLE = {
    "model": dict(type="Net"),
    "test_dataloader": {},
    "test_evaluator": {},
    "test_cfg": {},
    "importance_dataloader": {},
}


@pytest.mark.parametrize(
    ("without", "arguments", "message"),
    [
        ("test_evaluator", {}, r"has no test_evaluator \(the metric\)"),
        ("test_dataloader", {}, r"has no test_dataloader \(the data of the metric\)"),
        ("importance_dataloader", {}, r"no importance_dataloader and no train_dataloader"),
        ("", {"finetune": FinetuneSettings(3)}, r"has no train_dataloader, which fine-tuning needs"),
        ("", {"checkpoint": None}, r"names no checkpoint: .* give --checkpoint"),
        ("", {"methods": ["mdp", "hapl"]}, r"no method 'hapl'; choose from mdp, .*halp, uniform, magnitude"),
        ("", {"methods": ["mdp", "mdp"]}, r"'mdp' is named 2 times"),
        ("", {"cores": (99999,)}, r"may not use core 99999, only \d"),
        ("", {"close": 3.0}, r"--close: 3 is no share of the budget"),
        ("", {"budgets": ["1.5"]}, r"share of the dense latency and must not exceed 1"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(tmp_path, without, arguments, message):
    path = tmp_path / "config.py"
    Config({key: value for key, value in WHOLE.items() if key != without}).dump(path)
    given = {"checkpoint": "x.pth", "methods": ["mdp"], "budgets": ["0.5"], **arguments}
    with pytest.raises(MdpError, match=message):
        Comparison(str(path), work_dir=tmp_path / "work", **given)
    assert not (tmp_path / "work").exists()


def test_a_budget_in_two_spellings_is_one():
    assert different_budgets(["0.7", "70%", "10ms", "0.55", "100fps", ".70", "55%"]) == ["0.7", "10ms", "0.55"]
    job = Comparison(CONFIG, None, ["mdp"], ["0.7", "70%"], Path("unused"))
    assert job.budgets == ["0.7"]


def test_a_missing_library_is_told_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"torch-pruning needs .*'torch_pruning'.*'mdp_mmdet3d\[all\]'"):
        methods.check_methods(["torch-pruning"])


def test_recipe_of_fine_tuning(tmp_path):
    path = tmp_path / "config.py"
    Config(dict(model={}, optim_wrapper=dict(optimizer=dict(type="Adam", lr=1e-3)))).dump(path)
    assert finetune_settings(str(path), None, None) is None
    assert finetune_settings(str(path), 7, None) == FinetuneSettings(7, lr=pytest.approx(1e-4))
    assert finetune_settings(CONFIG, None, None).iterations == 300 and finetune_settings(CONFIG, 0, None) is None
    assert finetune_settings(CONFIG, 5, 1e-5) == FinetuneSettings(5, lr=1e-5, keep_statistics=True)
    Config(dict(model={})).dump(path)
    with pytest.raises(MdpError, match=r"no optim_wrapper\.optimizer\.lr: give --lr"):
        finetune_settings(str(path), 7, None)
    Config(dict(model={}, prune=dict(finetune="auto"))).dump(path)
    with pytest.raises(MdpError, match=r"prune\.finetune = 'auto' trains plans by their shares.* give --finetune N"):
        finetune_settings(str(path), None, None)
    assert finetune_settings(str(path), 7, 1e-4) == FinetuneSettings(7, lr=1e-4)


def test_what_a_comparison_kept_of_a_plan_belongs_to_it(tmp_path, traced):
    _, _, space = traced
    plan = PruningPlan.from_kept(space, {"a.out": (tuple(range(8)),)}, frozenset())
    plan.save(tmp_path / "plan.json")
    kept = {"schema_version": 1, "identity": {}, "plan_hash": plan.hash, "measured_share": 0.5, "dense_ms": [1.0]}
    kept |= {"params": 3, "macs": 4}
    path = tmp_path / "tuned.json"
    write_json(path, kept)
    assert tuned_plan(tmp_path) == kept
    for changes, message in (
        ({"plan_hash": "0" * 16}, rf"is of plan 0+, beside plan {plan.hash}: it is damaged; delete the folder"),
        ({"dense_ms": None}, "lacks dense_ms"),
    ):
        write_json(path, {key: value for key, value in {**kept, **changes}.items() if value is not None})
        with pytest.raises(FileFormatError, match=message):
            tuned_plan(tmp_path)
    path.write_text(path.read_text()[:40])
    with pytest.raises(FileFormatError, match=r"tuned\.json is truncated or not JSON"):
        tuned_plan(tmp_path)


def test_a_seed_that_is_none_is_refused_before_the_plans(tmp_path):
    with pytest.raises(MdpError, match=r"prune\.finetune\.seed = -1 must be at least 0"):
        Comparison(CONFIG, None, ["mdp"], ["0.5"], tmp_path, finetune=FinetuneSettings(3), seeds=(0, -1))
