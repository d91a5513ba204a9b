"""The whole line by values in units of loss, on a thin ResNet-18 with weights: candidates, report, reuse, taylor."""

from __future__ import annotations

import json

import mmpretrain.models  # noqa: F401
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from rich.console import Console
from torch import nn

from mdp_mmdet3d.files import read_npz
from mdp_mmdet3d.importance import loss_probe
from mdp_mmdet3d.runner.job import PruneJob
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.plan import PruningPlan

pytestmark = pytest.mark.slow
SIZE = (64, 64)
FRAMES = 8


@pytest.fixture(scope="module", autouse=True)
def default_scope():
    yield
    init_default_scope("mmdet3d")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """MMPretrain's ResNet-18, thin, with images of two kinds that differ in brightness."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, brightest in (("dark", 130), ("light", 255)):
        (root / name).mkdir()
        for i in range(FRAMES // 2):
            Image.fromarray(rng.integers(0, brightest, (*SIZE, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return Config(
        dict(
            default_scope="mmpretrain",
            model=dict(
                type="ImageClassifier",
                data_preprocessor=dict(num_classes=2, mean=[127.0] * 3, std=[60.0] * 3, to_rgb=True),
                backbone=dict(type="ResNet", depth=18, base_channels=16, stem_channels=16, zero_init_residual=False),
                neck=dict(type="GlobalAveragePooling"),
                head=dict(type="LinearClsHead", num_classes=2, in_channels=128, loss=dict(type="CrossEntropyLoss")),
            ),
            train_dataloader=dict(
                batch_size=1,
                num_workers=0,
                sampler=dict(type="DefaultSampler", shuffle=False),
                dataset=dict(
                    type="CustomDataset",
                    data_root=str(root),
                    pipeline=[dict(type="LoadImageFromFile"), dict(type="PackInputs")],
                ),
            ),
            prune=dict(
                budget=0.7, frames=FRAMES, input_size=SIZE, max_options=3, channel_multiple=8, rounds=4,
                refinements=0, fit_networks=2, repair=dict(frames=FRAMES),
                importance=dict(type="loss", frames=FRAMES, max_frames=FRAMES, widths=1),
            ),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(config, tmp_path_factory):
    """Weights whose every part counts: statistics of batch norms that are not 0 and 1."""
    init_default_scope("mmpretrain")
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            nn.init.normal_(module.bias, 0, 0.1)
    path = tmp_path_factory.mktemp("weights") / "dense.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    return str(path)


def prune(config, checkpoint, work_dir, **overrides):
    settings = PruneSettings.from_config({**config.prune, **overrides})
    return PruneJob(config, settings, work_dir, checkpoint, Console(quiet=True)).run()


@pytest.fixture(scope="module")
def run(config, checkpoint, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp("run")
    return work_dir, prune(config, checkpoint, work_dir)


def test_the_best_candidate_after_repair_is_delivered(run):
    work_dir, report = run
    values = report["values"]
    candidates = values["candidates"]
    hows = [candidate["how"] for candidate in candidates]
    assert hows[0].startswith("by single cuts") and any("first order" in how for how in hows)
    assert values["repaired"] == min(candidate["repaired"] for candidate in candidates)
    assert report["weights"] != "random"
    plan = PruningPlan.load(work_dir / "plan.json")
    assert plan.hash == report["plan_hash"] == values["plan"] and (plan.cuts or plan.removed)
    assert values["frames"] == FRAMES and np.isfinite(values["dense_loss"])
    # What was written is what was compared: its loss, measured once more, is that of the repaired candidate.
    assert values["delivered"] == pytest.approx(values["repaired"], abs=1e-4 * max(1.0, values["dense_loss"]))
    assert report["repair"]["refitted"] > 0
    assert not (work_dir / "candidate").exists()
    assert json.loads((work_dir / "report.json").read_text()) == json.loads(json.dumps(report))


def test_every_part_has_its_loss_change(run):
    work_dir, _ = run
    space = PruningSpace.load(work_dir / "space.json")
    changes = json.loads((work_dir / "loss_changes.json").read_text())
    assert set(changes["blocks"]) == {block.name for block in space.blocks}
    assert set(changes["widths"]) == {dimension.name for dimension in space.dimensions}
    measured = [change for counts in changes["widths"].values() for change in counts.values()]
    assert any(abs(change["mean"]) > 1e-4 for change in measured)


def test_no_cut_is_measured_twice(run, config, checkpoint, monkeypatch):
    """The latency table has grown meanwhile, so candidates may be new; what was measured is not cut again."""
    work_dir, _ = run
    meta, _ = read_npz(work_dir / "losses.npz", what="measured losses", schema_version=loss_probe.SCHEMA_VERSION)
    changes = (work_dir / "loss_changes.json").read_bytes()
    cut = []

    def noted(model, plan):
        cut.append(plan.hash)
        return apply_plan(model, plan)

    monkeypatch.setattr(loss_probe, "apply_plan", noted)
    prune(config, checkpoint, work_dir)
    assert len(meta["plans"]) > 20 and not set(cut) & set(meta["plans"])
    assert (work_dir / "loss_changes.json").read_bytes() == changes
