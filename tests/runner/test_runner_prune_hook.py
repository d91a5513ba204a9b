"""The pruning hook in MMEngine's training: schedule, masks, repair, resuming, processes."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

import mdp_mmdet3d.runner  # noqa: F401
import projects.streampetr  # noqa: F401
from mdp_mmdet3d.adapters import adapter_of
from mdp_mmdet3d.errors import InfeasibleBudgetError, MdpError, StructureMismatchError, WriteError
from mdp_mmdet3d.files import write_json
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.latency.backends.fake import FakeBackend
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.predict import LatencyModel
from mdp_mmdet3d.runner.importance_hook import space_of
from mdp_mmdet3d.runner.prune_hook import LiveMask, load_latency, solve_plan
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.space.types import BlockKind
from mdp_mmdet3d.surgery.apply import apply_plan, keep_masks
from mdp_mmdet3d.surgery.plan import PruningPlan

from .hook_trainings import PRUNE, ROOT, assert_same, train


@pytest.fixture
def latency_dir(tmp_path, make_config) -> Path:
    """What tools/prune.py leaves: a table of the fake device and 'whole' measurements that agree with it."""
    from mmdet3d.registry import MODELS
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet3d")
    config = make_config(tmp_path / "none", [], 1)
    model = MODELS.build(config.model)
    space = space_of(model, config, PruneSettings.from_config(PRUNE))
    folder = tmp_path / "latency"
    folder.mkdir()
    table = measure_latency(space, FakeBackend(), folder / "latency_table.json", policy="exact", progress=False)
    engines = tuple(dict.fromkeys(term.engine for term in space.frame_terms()))
    unit = LatencyModel(space, table, dict.fromkeys(engines, 0.05), dict.fromkeys(engines, 1.0))
    smallest = {d.name: d.options[0] for d in space.dimensions}
    points = [dict(widths=w, removed=[], stages_ms=unit.predict_engines(w)) for w in ({}, smallest)]
    write_json(
        folder / "whole_latency.json",
        dict(schema_version=1, identity=dict(fingerprint=space.model_digest), points=points),
    )
    return folder


def prune_hook(latency_dir: Path, **kwargs) -> dict:
    return dict(type="MDPPruneHook", latency_dir=str(latency_dir), **{"steps_each": 2, "num_prunings": 2, **kwargs})


def scalars(work_dir: Path) -> list[dict]:
    lines = next(work_dir.rglob("scalars.json")).read_text().splitlines()
    return [row for row in map(json.loads, lines) if "mdp/budget_ms" in row]


def test_schedule_masks_keeps_shapes_writes_a_pruned_model_and_logs_it(make_config, latency_dir, tmp_path) -> None:
    hooks = [prune_hook(latency_dir), dict(type="PlanLoggerHook")]
    config = make_config(tmp_path / "w", hooks, 20, lr=1e-3)
    config.visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
    runner = Runner.from_cfg(config)
    shapes = {k: v.shape for k, v in runner.model.state_dict().items()}
    parameters = [id(p) for p in runner.model.parameters()]
    runner.train()
    assert runner.iter == 4  # two prunings of two steps, then the training ends
    assert {k: v.shape for k, v in runner.model.state_dict().items()} == shapes
    assert [id(p) for p in runner.model.parameters()] == parameters
    plan = PruningPlan.load(tmp_path / "w" / "plan.json")
    dense_ms = json.loads((latency_dir / "whole_latency.json").read_text())["points"][0]["stages_ms"]
    assert plan.info["budget_ms"] == pytest.approx(0.6 * sum(dense_ms.values()))
    assert plan.info["predicted_ms"] <= plan.info["budget_ms"] * (1 + 1e-9) and plan.cuts
    logged = scalars(tmp_path / "w")
    assert [row["mdp/budget_ms"] for row in logged] == pytest.approx(
        [sum(dense_ms.values()) * share for share in (0.6**0.5, 0.6)]
    )
    # A cut channel of the live model is zero; the pruned files load as they are.
    for cut in plan.cuts.values():
        member = next(m for m in cut.members if m.tensor.endswith("weight") and m.axis == 0)
        weight = runner.model.state_dict()[member.tensor]
        gone = sorted(set(range(cut.size)) - set(cut.kept[0]))[0]
        assert not weight[member.offset + gone * member.width].any()
    from projects.streampetr.checkpoint import load_checkpoint

    pruned_config = Config.fromfile(tmp_path / "w" / "pruned_config.py")
    assert not any(hook["type"] == "MDPPruneHook" for hook in pruned_config.custom_hooks)
    from mmdet3d.registry import MODELS

    pruned = MODELS.build(pruned_config.model)
    load_checkpoint(pruned, tmp_path / "w" / "pruned.pth")
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in runner.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 3])
def test_resuming_a_schedule_ends_at_the_same_plan(make_config, latency_dir, tmp_path, stop_at) -> None:
    def config(name: str, iterations: int) -> Config:
        made = make_config(tmp_path / name, [prune_hook(latency_dir)], iterations, lr=1e-3)
        made.default_hooks.checkpoint.interval = 1
        return made

    train(config("whole", 9))
    train(config("parts", stop_at))
    resumed = config("parts", 9)
    resumed.resume, resumed.load_from = True, str(tmp_path / "parts" / f"iter_{stop_at}.pth")
    train(resumed)
    plans = [PruningPlan.load(tmp_path / name / "plan.json") for name in ("whole", "parts")]
    assert plans[0].hash == plans[1].hash
    files = [tmp_path / name / "pruned.pth" for name in ("whole", "parts")]
    states = [torch.load(file, weights_only=True)["state_dict"] for file in files]
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_plan_and_its_checkpoint_appear_together_and_are_repaired_on_resuming(
    make_config, latency_dir, tmp_path, monkeypatch
) -> None:
    from mdp_mmdet3d.checkpoint.load import check_meta
    from mdp_mmdet3d.runner import outputs

    def config(iterations: int = 9) -> Config:
        made = make_config(tmp_path / "w", [prune_hook(latency_dir)], iterations, lr=1e-3)
        made.default_hooks.checkpoint.interval = 1
        return made

    def resume(at: int, **hook) -> None:
        made = config()
        made.custom_hooks[0].update(hook)
        made.resume, made.load_from = True, str(tmp_path / "w" / f"iter_{at}.pth")
        train(made)

    def assert_pair() -> None:
        plan = PruningPlan.load(tmp_path / "w" / "plan.json")
        check_meta(torch.load(tmp_path / "w" / "pruned.pth", weights_only=True)["meta"], plan)

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "write_pruned_config", full)
        with pytest.raises(WriteError, match="No space left on device"):
            train(config())
    assert not [name for name in outputs.PRUNED_FILES if (tmp_path / "w" / name).exists()]
    resume(3)
    assert_pair()
    # What belonged to an earlier plan goes with it, but only when the new one is complete.
    stale = tmp_path / "w" / "problem.npz"
    stale.touch()
    before = (tmp_path / "w" / "plan.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "save_pruned_checkpoint", full)
        with pytest.raises(WriteError):
            resume(3, budget=0.8)
    assert (tmp_path / "w" / "plan.json").read_bytes() == before and stale.exists()
    assert_pair()
    resume(3, budget=0.8)
    assert (tmp_path / "w" / "plan.json").read_bytes() != before and not stale.exists()
    assert_pair()
    # A schedule that is over repairs what was damaged later.
    resume(3, stop=False)
    (tmp_path / "w" / "pruned.pth").write_bytes((tmp_path / "w" / "pruned.pth").read_bytes()[:1000])
    resume(4)
    assert_pair()


def test_a_schedule_repairs_what_it_leaves_and_draws_none_of_the_trainings_numbers(
    make_config, latency_dir, tmp_path
) -> None:
    """At rate 0 the training changes nothing, so all that differs from the cut model is the repair."""

    def trained(name: str, **repair) -> tuple[Runner, dict, torch.Tensor]:
        config = make_config(tmp_path / name, [prune_hook(latency_dir, num_prunings=1)], 9)
        config.prune.update(repair)
        runner = train(config)
        return runner, torch.load(tmp_path / name / "pruned.pth", weights_only=True)["state_dict"], torch.rand(3)

    (_, raw, drawn), (run, repaired, drawn_too) = (
        trained("raw"),
        trained("repaired", repair=dict(frames=3), num_cams=6),
    )
    assert torch.equal(drawn, drawn_too)
    plan = PruningPlan.load(tmp_path / "repaired" / "plan.json")
    assert plan.hash == PruningPlan.load(tmp_path / "raw" / "plan.json").hash
    cut = [name for name in raw if not torch.equal(raw[name], repaired[name])]
    assert cut and all(repaired[name].isfinite().all() for name in cut)
    # The live model holds the repaired weights where they stay, and 0 where the plan cuts.
    masks = keep_masks(run.model, plan)
    assert len(masks) > 20
    for name, kept in run.model.named_parameters():
        if name not in repaired:
            continue
        for axis, mask in masks.get(name, {}).items():
            kept = kept.index_select(axis, mask.nonzero().flatten())
        torch.testing.assert_close(kept, repaired[name])
    # What the dense model computes is nearer.
    dense = train(make_config(tmp_path / "dense", [], 1)).model.eval()
    adapter = adapter_of(run.cfg, PruneSettings.from_config(run.cfg.prune).input_shape, None)
    frame = adapter.calibration_frames(dense, 1)[0]
    models = {name: apply_plan(copy.deepcopy(dense), plan).eval() for name in ("raw", "repaired")}
    models["raw"].load_state_dict(raw)
    models["repaired"].load_state_dict(repaired)

    def memory(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return frame(model)[1].embedding

    expected = memory(dense)
    errors = {name: float((memory(model) - expected).norm()) for name, model in models.items()}
    assert errors["repaired"] < 0.9 * errors["raw"]


def test_a_schedule_by_loss_values_asks_for_them_with_the_weights_of_the_moment(
    make_config, latency_dir, tmp_path, monkeypatch
) -> None:
    from mdp_mmdet3d.runner import prune_hook as module

    asked = []

    def found(live, search, adapter, settings, folder, weights, say, repairing):
        asked.append((settings.frames, folder.name, weights, search.budget_ms, repairing, type(adapter).__name__))
        assert not any(p.is_meta for p in live.parameters()) and search.importance.batches == 2
        return search.solve()

    monkeypatch.setattr(module, "find_live_plan", found)
    loss = dict(type="loss", frames=4, max_frames=4)
    run = train(make_config(tmp_path / "w", [prune_hook(latency_dir, importance=loss)], 9))
    budgets = [run._hooks[[type(h).__name__ for h in run._hooks].index("MDPPruneHook")].budget_of(k) for k in (1, 2)]
    assert asked == [
        (4, f"pruning_{k}", f"iteration {2 * k}", budget, None, "StreamPETRAdapter")
        for k, budget in zip((1, 2), budgets)
    ]
    with pytest.raises(MdpError, match=r"prune\.importance"):
        train(make_config(tmp_path / "x", [prune_hook(latency_dir, importance="fisher")], 1))


def test_masks_of_removed_layers_silence_their_parts(make_config, tmp_path) -> None:
    from mmdet3d.registry import MODELS
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet3d")
    config = make_config(tmp_path / "none", [], 1)
    model = MODELS.build(config.model)
    space = space_of(model, config, PruneSettings.from_config(PRUNE))
    layer = next(block for block in space.blocks if block.kind is BlockKind.LAYER)
    plan = PruningPlan.from_kept(space, {}, {layer.name})
    LiveMask(model, plan, space)
    module = model.get_submodule(layer.name)
    for part in (module.attentions[0].attn.out_proj, module.attentions[1].attn.out_proj, module.ffns[0].layers[1]):
        assert not part.weight.any() and not part.bias.any()
    assert module.norms[0].weight.all()


def test_latency_of_another_model_and_impossible_budgets_are_refused(make_config, latency_dir, tmp_path) -> None:
    from mmdet3d.registry import MODELS

    config = make_config(tmp_path / "w", [], 1)
    space = space_of(MODELS.build(config.model), config, PruneSettings.from_config(PRUNE))
    latency, dense_ms = load_latency(latency_dir, space)
    zeros = {d.name: {s.block: np.ones((d.copies, d.size)) for s in d.sources} for d in space.dimensions}
    importance = ImportanceTable(space.model_digest, "x", 1, 0, 1, zeros)
    with pytest.raises(InfeasibleBudgetError):
        solve_plan(space, importance, latency, 1e-6 * dense_ms, 60.0)
    config.model.pts_bbox_head.decoder.ffn_hidden_dims = 256
    config.custom_hooks = [prune_hook(latency_dir)]
    with pytest.raises(StructureMismatchError, match="measured for another model"):
        train(config)
    for changes, message in (
        (dict(steps_each=0), "steps_each=0 must be a whole number of at least 1"),
        (dict(steps_each=2.5), r"steps_each=2\.5 must be a whole number"),
        (dict(budget="fast"), "budget 'fast' is not understood"),
    ):
        with pytest.raises(MdpError, match=message):
            config.custom_hooks = [prune_hook(latency_dir, **changes)]
            train(config)


@pytest.mark.slow
@pytest.mark.numerics
def test_two_processes_find_the_importance_and_plan_of_one(make_config, latency_dir, tmp_path) -> None:
    """Two processes with a frame each against one that accumulates two frames: the same mean gradients."""
    hooks = [dict(type="ImportanceHook", num_steps=2), prune_hook(latency_dir, num_prunings=1)]
    train(make_config(tmp_path / "one", hooks, 4, accumulative_counts=2))
    config = make_config(tmp_path / "two", hooks, 2)
    config.env_cfg = dict(dist_cfg=dict(backend="gloo"))
    config.dump(tmp_path / "config.py")
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
         "--rdzv_endpoint=localhost:0", str(ROOT / "tools" / "train.py"), str(tmp_path / "config.py"),
         "--launcher", "pytorch", "--work-dir", str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1",
             "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=400)  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    tables = [ImportanceTable.load(tmp_path / name / "importance.npz") for name in ("one", "two")]
    assert_same(tables[1], tables[0], rtol=1e-3)
    one, two = (PruningPlan.load(tmp_path / name / "plan.json") for name in ("one", "two"))
    assert one.removed == two.removed and one.cuts.keys() == two.cuts.keys()
    for name, cut in one.cuts.items():
        assert cut.count == two.cuts[name].count
        # Channels that nearly tie may have changed places; what they are worth is the same.
        scores = tables[0].total(name)
        kept = [sum(scores[copy, list(k)].sum() for copy, k in enumerate(c.kept)) for c in (cut, two.cuts[name])]
        assert kept[1] == pytest.approx(kept[0], rel=1e-3)
