"""Plans by values in units of loss: what is predicted, measured, corrected; the best by measurement is kept."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mdp_mmdet3d.importance.collect import collect_importance
from mdp_mmdet3d.importance.loss_changes import spearman
from mdp_mmdet3d.importance.values import LossChange
from mdp_mmdet3d.runner.live import find_live_plan
from mdp_mmdet3d.runner.loss_search import Candidate, different, find_loss_search, put_back, undecided
from mdp_mmdet3d.runner.optimise import PlanSearch
from mdp_mmdet3d.runner.settings import LossSettings
from mdp_mmdet3d.solver.build import Ranking, build_problem, kept_elements
from mdp_mmdet3d.solver.problem import ProblemStructure
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.plan import PruningPlan
from tests.importance.loss_nets import batches, losses, net_space, trained


class Adapter:
    """As much of an adapter as values need."""

    count = 8

    def importance_batches(self):
        return iter(batches(self.count))

    def deployed_loss(self, model, batch):
        return losses(model, batch)

    def data_identity(self):
        return "generated"


class Latency:
    """One millisecond per element and block, three of them for a bottleneck."""

    total_fixed_ms = 10.0
    table = SimpleNamespace(device="fake", get=lambda *_: 1.0)

    def __init__(self, space, layer=1.0):
        self.space, self.factors = space, {"blocks": 3.0, "layer": layer}

    def cost_array(self, term):
        options = np.array(self.space.by_name[term.dimensions[0]].options, dtype=float)
        factor = self.factors.get(term.name.partition(".")[0], 1.0)
        return factor * (1.0 + options), np.zeros(len(options), dtype=bool)


@pytest.fixture(scope="module")
def nouns(tmp_path_factory):
    net = trained()
    space = net_space(net)
    path = tmp_path_factory.mktemp("importance") / "importance.npz"
    options = dict(num_batches=8, weights="w", losses=losses, progress=False)
    return net, space, collect_importance(net, space, batches(8), path, **options)


@pytest.fixture
def make(nouns, tmp_path):
    net, space, importance = nouns

    def search_of(folder=tmp_path, **settings):
        said = []
        settings = LossSettings(frames=8, max_frames=8, **settings)
        loss = find_loss_search(Adapter(), net, space, importance, "w", settings, folder, said.append)
        return loss, said

    return search_of


def plan_search(nouns, budget_ms, layer=1.0):
    _, space, importance = nouns
    return PlanSearch(space, importance, Latency(space, layer), None, None, budget_ms, 60.0)


@pytest.mark.parametrize("share", [0.85, 0.6, 0.4])
def test_the_best_measured_plan_is_kept_and_reported(nouns, make, share):
    loss, said = make(corrections=2)
    search = plan_search(nouns, share * 144.0)
    plan = loss.solve(search)
    report = loss.report
    assert plan.hash == report["plan"] == search.plan().hash
    assert plan.info["predicted_loss_change"] == report["predicted"] == search.predicted_loss_change
    assert report["measured"] == pytest.approx(loss.probe.change(plan).mean())
    assert report["measured"] == min(candidate["measured"] for candidate in report["candidates"])
    assert report["candidates"][0]["how"] == "by single cuts"
    assert search.predicted_ms <= share * 144.0 * (1 + 1e-9)
    assert any("by single cuts" in line for line in said)
    assert "predicted_loss_change" not in plan_search(nouns, share * 144.0).solve().info


def test_where_plans_are_repaired_the_best_one_after_repair_is_kept(nouns, make):
    net, _, _ = nouns
    loss, said = make()
    built = []

    def repaired(plan):
        """A repair that makes the plan of first-order importance as good as dense, and the others bad."""
        built.append(plan.hash)
        model = copy.deepcopy(net)
        if plan.hash != taylor.hash:
            with torch.no_grad():
                model.head.bias += 1.0
        return model

    taylor = plan_search(nouns, 80.0).solve()
    loss.repaired, loss.repaired_as = repaired, "test"
    search = plan_search(nouns, 80.0)
    plan = loss.solve(search)
    assert plan.hash == search.plan().hash == taylor.hash
    assert loss.report["candidates"][-1]["how"] == "first order"
    assert loss.report["repaired"] == min(candidate["repaired"] for candidate in loss.report["candidates"])
    assert all("repaired" in line for line in said if "measured" in line)
    count = len(built)
    assert loss.solve(plan_search(nouns, 80.0)).hash == taylor.hash and len(built) == count  # known by now


def test_where_plans_are_repaired_a_plan_that_keeps_its_costliest_layer_is_compared_too(nouns, make):
    net, _, _ = nouns
    loss, _ = make(corrections=0)
    # As a whole the layer costs less than its parts, so it goes as a whole.
    blocks = {"layer": LossChange(0.02, 0.001), "layer.0": LossChange(0.5, 0.01), "layer.1": LossChange(0.5, 0.01)}
    changes = loss.values.changes
    loss.values = replace(loss.values, changes=replace(changes, blocks={**changes.blocks, **blocks}))
    search = plan_search(nouns, 250.0, layer=30.0)
    search.values = loss.values
    removing = search.solve()
    assert "layer" in removing.removed

    def repaired(plan):
        """A repair after which only plans with their layer are as good as dense."""
        model = copy.deepcopy(net)
        if "layer" in plan.removed:
            with torch.no_grad():
                model.head.bias += 1.0
        return model

    loss.repaired, loss.repaired_as = repaired, "test"
    plan = loss.solve(search)
    found = {candidate["how"]: candidate for candidate in loss.report["candidates"]}
    assert found["by single cuts"]["plan"] == removing.hash
    assert found["layer kept"]["plan"] != removing.hash
    assert found["layer kept"]["predicted"] < 1.0  # the cut as it is, not the factor that keeps the layer
    assert "layer" not in plan.removed and search.predicted_ms <= 250.0 * (1 + 1e-9)


@pytest.mark.parametrize(("errors", "frames"), [(0.0, 8), (1e9, 24)])
def test_more_frames_are_taken_only_while_plans_cannot_be_told_apart(nouns, tmp_path, monkeypatch, errors, frames):
    net, space, importance = nouns
    monkeypatch.setattr(Adapter, "count", 24)
    monkeypatch.setattr("mdp_mmdet3d.runner.loss_search.UNDECIDED", errors)
    settings, said = LossSettings(frames=8, max_frames=24, corrections=0), []
    loss = find_loss_search(Adapter(), net, space, importance, "w", settings, tmp_path, said.append)
    probe = loss.probe
    while probe.frames > 8:  # the values may have taken more
        probe.rounds -= 1
    first = loss.values.changes

    def repaired(plan):
        """The dense model, disturbed differently per plan."""
        model = copy.deepcopy(net)
        with torch.no_grad():
            model.head.bias += 1e-3 if plan.hash == taylor.hash else -1e-3
        return model

    taylor = plan_search(nouns, 80.0).solve()
    loss.repaired, loss.repaired_as = repaired, "test"
    plan = loss.solve(plan_search(nouns, 80.0))
    record = {candidate["plan"]: candidate for candidate in loss.report["candidates"]}
    assert len(record) == 2
    assert loss.report["compared_frames"] == frames
    assert plan.hash == min(record, key=lambda each: record[each]["compared"])
    assert probe.frames == 8 and loss.values.changes is first


def test_a_model_in_training_is_measured_as_it_is_and_left_as_it_is(nouns, make, tmp_path):
    net, _, _ = nouns
    loss, _ = make(tmp_path / "job")
    expected = loss.solve(plan_search(nouns, 80.0))
    live = copy.deepcopy(net).train()
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    torch.manual_seed(3)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    settings, said = LossSettings(frames=8, max_frames=8), []
    plan = find_live_plan(live, plan_search(nouns, 80.0), Adapter(), settings, tmp_path / "live", "w", said.append)
    assert torch.equal(torch.rand(2), drawn)
    assert plan.hash == expected.hash and any("by single cuts" in line for line in said)
    assert live.training and all(torch.equal(before[name], tensor) for name, tensor in live.state_dict().items())
    assert (tmp_path / "live" / "loss_changes.json").is_file()


def test_plans_that_may_be_the_best():
    rng = np.random.default_rng(0)
    pieces = np.repeat(np.arange(8), 8)
    common, scene = rng.normal(size=64), np.repeat(rng.normal(size=8), 8)
    worse = common + 0.5 + 0.1 * rng.normal(size=64)
    assert undecided([worse, common], pieces) == [1]
    # Frames of one scene are alike: 64 of them that differ by scene are only eight observations.
    alike = common + 0.5 + 1.0 * (scene - scene.mean())
    assert undecided([alike, common], pieces) == [1, 0]
    assert undecided([alike, common], np.zeros(64, dtype=int)) == [1]
    assert undecided([common, common], pieces) == [0]  # the same plan twice


def test_the_same_again_from_the_files(nouns, make, tmp_path):
    loss, _ = make()
    first = loss.solve(plan_search(nouns, 80.0))
    again, _ = make()
    second = again.solve(plan_search(nouns, 80.0))
    assert first.to_dict() == second.to_dict() and again.report == loss.report
    assert (tmp_path / "loss_changes.json").stat().st_size > 0
    assert not list(tmp_path.glob("*.partial*"))


def test_nothing_is_corrected_where_the_prediction_holds(nouns, make):
    """With one part cut, putting it back gains its own change."""
    loss, _ = make(corrections=3)
    loss.solve(plan_search(nouns, 142.0))
    assert loss.report["predicted"] == pytest.approx(max(loss.report["measured"], 0.0), abs=1e-5)
    assert len(loss.report["candidates"]) == 1


def test_prediction_ranks_random_plans(nouns, make):
    _, space, importance = nouns
    loss, _ = make()
    ranking = Ranking.by_importance(space, importance)
    problem = build_problem(space, importance, Latency(space), ranking, loss.values)
    rng = np.random.default_rng(0)
    predicted, measured = [], []
    for _ in range(30):
        options = tuple(int(rng.integers(len(d.options))) for d in space.dimensions)
        kept = [bool(rng.random() < 0.8) for _ in space.blocks]
        kept = tuple(k and all(kept[[b.name for b in space.blocks].index(n)] for n in space.chain(b.name))
                     for k, b in zip(kept, space.blocks))  # fmt: skip
        plan = problem.canonical(ProblemStructure(options, kept))
        predicted.append(problem.dense.value - problem.evaluate(plan).value)
        measured.append(loss.probe.change(PruningPlan.from_kept(space, *kept_elements(space, ranking, plan))).mean())
    assert spearman(np.array(predicted), np.array(measured)) >= 0.8


def test_parts_are_put_back_one_by_one(nouns):
    _, space, importance = nouns
    problem = build_problem(space, importance, Latency(space), Ranking.by_importance(space, importance))
    names = [b.name for b in space.blocks]
    removed = {"blocks.0", "layer", "layer.0", "layer.1"}
    narrow = tuple(0 if d.name == "blocks.1.conv1.out" else len(d.options) - 1 for d in space.dimensions)
    plan = ProblemStructure(narrow, tuple(name not in removed for name in names))
    found = put_back(space, problem, plan)
    assert set(found) == {"blocks.1.conv1.out", "blocks.0", "layer"}
    assert found["layer"].kept == tuple(name != "blocks.0" for name in names)
    assert found["blocks.1.conv1.out"] == ProblemStructure(problem.dense_plan.options, plan.kept)


def test_what_is_delivered_is_measured_as_it_is(nouns, make):
    net, space, _ = nouns
    loss, _ = make()
    plan = PruningPlan.from_kept(space, {}, {"blocks.0"})
    raw = apply_plan(copy.deepcopy(net), plan)
    found = loss.delivered(raw)
    assert found["delivered"] != pytest.approx(loss.probe.change(plan).mean(), abs=1e-4)  # batch norms as they were


def test_one_plan_that_several_values_lead_to_is_one_candidate():
    def candidate(how, plan):
        return Candidate({"how": how, "plan": plan}, None, None, None)

    found = different([candidate("by single cuts", "a"), candidate("corrected", "b"), candidate("first order", "a")])
    assert [c.record for c in found] == [
        {"how": "by single cuts, first order", "plan": "a"},
        {"how": "corrected", "plan": "b"},
    ]
