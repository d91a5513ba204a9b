"""Accuracy and fine-tuning as steps of the pruning job: results, reuse, interruption, errors."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from rich.console import Console

import mdp_mmdet3d.runner  # noqa: F401
from mdp_mmdet3d.adapters import InputShape, adapter_of
from mdp_mmdet3d.errors import FileFormatError, MdpError
from mdp_mmdet3d.report.summary import print_summary
from mdp_mmdet3d.runner import recovery
from mdp_mmdet3d.runner.finetune_length import finetuning_of
from mdp_mmdet3d.runner.job import PruneJob
from mdp_mmdet3d.runner.recovery import evaluate, finetune, model_identity
from mdp_mmdet3d.runner.settings import FinetuneSettings, PruneSettings
from mdp_mmdet3d.simdata.mini_nuscenes import easy_spec, write_mini_nuscenes

ROOT = Path(__file__).resolve().parents[2]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The demo's config on two scenes of three frames."""
    root = tmp_path_factory.mktemp("easy") / "data"
    write_mini_nuscenes(root, easy_spec(scenes=2, frames=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINI_NUSCENES_ROOT", str(root))
        config = Config.fromfile(ROOT / "configs/streampetr_mini_mdp.py")
    config.prune.update(
        frames=2,
        rounds=4,
        fit_networks=2,
        refinements=1,
        max_options=3,
        budget=0.5,  # far enough below dense that a disturbed measurement still cuts something
        importance="taylor",  # three frames are too few for values in units of loss
        repair=dict(frames=4, keep_raw=True),
        finetune=dict(iterations=4, save_interval=2),
    )
    return config


@pytest.fixture(scope="module")
def dense(config, tmp_path_factory):
    """A dense model and its checkpoint."""
    model, _ = adapter_of(config, InputShape(6, 64, 176)).build(None)
    path = tmp_path_factory.mktemp("dense") / "dense.pth"
    torch.save({"state_dict": model.state_dict(), "meta": {}}, path)
    return model, path


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_the_job_shows_accuracy_before_and_after_fine_tuning(config, dense, tmp_path, monkeypatch):
    def run():
        job = PruneJob(config, PruneSettings.from_config(config.prune), tmp_path, str(dense[1]), QUIET)
        return job.run()

    report = run()
    assert list(report["accuracy"]) == ["dense", "pruned", "repaired", "finetuned"]
    raw = state_of(tmp_path / "pruned_raw.pth")
    assert report["repair"]["refitted"] > 20 and (tmp_path / "repair/finished.json").is_file()
    for figures in report["accuracy"].values():
        assert set(figures) == {"mAP", "NDS"} and all(0 <= value <= 1 for value in figures.values())
    assert report["finetune"]["iterations"] == 4 and report["finetune"]["checkpoint"] == "finetune/finetuned.pth"
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    pruned, tuned = state_of(tmp_path / "pruned.pth"), state_of(tmp_path / "finetune/finetuned.pth")
    assert {k: v.shape for k, v in pruned.items()} == {k: v.shape for k, v in tuned.items()}
    assert any(not torch.equal(pruned[key], tuned[key]) for key in pruned)
    assert raw.keys() == pruned.keys() and any(not torch.equal(pruned[key], raw[key]) for key in pruned)
    text = Console(width=160)
    with text.capture() as captured:
        print_summary(report, text)
    assert "pruned, fine-tuned" in captured.get() and "mAP" in captured.get()

    # Another run ends at the same plan, and reads what was evaluated and trained.
    files = {
        path: path.stat().st_mtime_ns
        for path in (*(tmp_path / "accuracy").glob("*.json"), tmp_path / "finetune/finetuned.pth")
    }
    monkeypatch.setattr(recovery.Runner, "from_cfg", lambda _: pytest.fail("a runner was built"))
    again = run()
    assert {key: again[key] for key in ("plan_hash", "accuracy", "finetune", "corrections")} == {
        key: report[key] for key in ("plan_hash", "accuracy", "finetune", "corrections")
    }
    assert files == {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.slow
def test_interrupted_fine_tuning_ends_where_an_uninterrupted_one_does(config, dense, tmp_path, monkeypatch):
    settings = FinetuneSettings(4, save_interval=2)
    identity = model_identity(config, "w", None)
    whole = state_of(finetune(config, dense[1], tmp_path / "whole", settings, identity, QUIET))

    class Stop(recovery._Bar):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recovery, "_Bar", Stop)
        finetune(config, dense[1], tmp_path / "parts", settings, identity, QUIET)
    assert (tmp_path / "parts/iter_2.pth").is_file() and not (tmp_path / "parts/finetuned.pth").exists()
    parts = state_of(finetune(config, dense[1], tmp_path / "parts", settings, identity, QUIET))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    assert not list((tmp_path / "parts").glob("iter_*"))

    # Another seed is another training, and starts from the beginning.
    other = state_of(
        finetune(config, dense[1], tmp_path / "parts", FinetuneSettings(4, seed=1, save_interval=2), identity, QUIET)
    )
    assert any(not torch.equal(other[key], whole[key]) for key in whole)


def test_batch_norms_can_keep_their_statistics(config, dense, tmp_path):
    for keep in (True, False):
        settings = FinetuneSettings(2, lr=1e-3, warmup=0, keep_statistics=keep)
        trained = state_of(finetune(config, dense[1], tmp_path / str(keep), settings, {}, QUIET))
        start = state_of(dense[1])
        statistics = [key for key in start if key.endswith(("running_mean", "running_var"))]
        assert all(torch.equal(trained[key], start[key]) for key in statistics) == keep
        assert not torch.equal(trained["img_backbone.layer4.0.bn1.weight"], start["img_backbone.layer4.0.bn1.weight"])


def test_accuracy_is_that_of_the_weights_and_kept_with_its_identity(config, dense, tmp_path, monkeypatch):
    identity = model_identity(config, "w", None)
    path = tmp_path / "dense.json"
    monkeypatch.setattr("mdp_mmdet3d.progress.INTERVAL_S", 0.0)
    log = Console(file=io.StringIO())
    result = evaluate(config, dense[0].state_dict(), path, identity, log, ("mAP", "NDS"))
    assert re.search(r"^  evaluation: 2 of \d+ batches, about \d+ s left$", log.file.getvalue(), re.M)
    assert any(key.endswith("car_AP_dist_2.0") for key in result["metrics"])
    assert evaluate(config, {}, path, identity, log, ("mAP", "NDS")) == result
    assert "  reused: " in log.file.getvalue()
    with pytest.raises(RuntimeError, match="Missing key"):
        evaluate(config, {}, path, model_identity(config, "other weights", None), QUIET, ("mAP", "NDS"))
    path.write_text("{")
    with pytest.raises(FileFormatError, match=r"accuracy .*dense\.json is truncated"):
        evaluate(config, {}, path, identity, QUIET, ("mAP", "NDS"))


def test_identity_depends_on_weights_plan_config_and_data(config, tmp_path):
    base = model_identity(config, "w", None)
    assert model_identity(config, "w", None) == base
    assert model_identity(config, "v", None) != base and model_identity(config, "w", "p") != base
    other = Config(config.to_dict())
    other.model.pts_bbox_head.decoder.dropout = 0.1
    assert model_identity(other, "w", None) != base
    root = tmp_path / "data"
    shutil.copytree(config.data_root, root, ignore=shutil.ignore_patterns("samples", "sweeps", "v1.0*", "maps"))
    moved = Config(config.to_dict())
    moved.train_dataloader.dataset.data_root = str(root)
    assert model_identity(moved, "w", None)["data"] == base["data"]
    with (root / "nuscenes_infos_train.pkl").open("ab") as stream:
        stream.write(b"x")
    assert model_identity(moved, "w", None)["data"] != base["data"]


def test_configs_that_cannot_evaluate_or_train_are_named(config, dense, tmp_path):
    without = Config(config.to_dict())
    without.test_evaluator = None
    with pytest.raises(MdpError, match=r"prune\.evaluate needs test_dataloader, test_cfg and test_evaluator"):
        evaluate(without, {}, tmp_path / "a.json", {}, QUIET, ("mAP", "NDS"))
    without = Config(config.to_dict())
    without.optim_wrapper = None
    with pytest.raises(MdpError, match=r"prune\.finetune needs optim_wrapper"):
        finetune(without, dense[1], tmp_path / "f", FinetuneSettings(1), {}, QUIET)
    without = Config(config.to_dict())
    without.train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=1)
    with pytest.raises(MdpError, match=r"prune\.finetune counts iterations"):
        finetune(without, dense[1], tmp_path / "f", FinetuneSettings(1), {}, QUIET)


def test_automatic_fine_tuning_goes_by_share_and_data(config):
    settings = PruneSettings.from_config({**config.prune, "finetune": "auto"})
    frames, batch = len(DATASETS.build(config.train_dataloader.dataset)), config.train_dataloader.batch_size

    def found(share):
        return finetuning_of(config, settings, share)

    assert found(0.5).iterations == math.ceil(7 * frames / batch) and found(0.51) == found(0.49) == found(0.5)
    assert found(0.4).iterations > found(0.7).iterations > found(0.999).iterations >= 1
    assert found(0.7).lr == pytest.approx(0.4 * config.optim_wrapper.optimizer.lr)
    asked = PruneSettings.from_config(config.prune)
    assert finetuning_of(config, asked, 0.5) == asked.finetuning
    assert finetuning_of(config, PruneSettings(), 0.5) is None
    without = Config(config.to_dict())
    del without.optim_wrapper["optimizer"]["lr"]
    with pytest.raises(MdpError, match=r"'auto' takes a share of optim_wrapper\.optimizer\.lr"):
        finetuning_of(without, settings, 0.5)


def test_a_job_that_cannot_fine_tune_ends_before_it_measures(config, tmp_path):
    without = Config(config.to_dict())
    without.train_dataloader = None
    settings = PruneSettings.from_config({**config.prune, "finetune": "auto"})
    with pytest.raises(MdpError, match=r"prune\.finetune needs train_dataloader"):
        PruneJob(without, settings, tmp_path / "job", None, QUIET).run()
    assert {path.name for path in (tmp_path / "job").glob("*")} <= {".lock"}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            dict(iteration=3),
            r"unknown key 'iteration' in the config's prune\.finetune section; did you mean 'iterations'",
        ),
        (dict(lr=1e-4), r"prune\.finetune\.iterations is missing in .*, e\.g\. iterations=300"),
        (dict(iterations=0), r"prune\.finetune\.iterations = 0 must be at least 1"),
        (dict(iterations=3, lr=0), r"prune\.finetune\.lr = 0 must be greater than 0"),
        (dict(iterations=3, seed=0.5), r"prune\.finetune\.seed = 0\.5 must be a whole number"),
        (300, r"prune\.finetune = 300 must be a dict"),
        ("atuo", r"prune\.finetune = 'atuo' must be 'auto', a dict such as"),
    ],
)
def test_bad_settings_are_named(section, message):
    with pytest.raises(MdpError, match=message):
        PruneSettings.from_config(dict(finetune=section))
    with pytest.raises(MdpError, match=r"prune\.evaluate = 'yes' must be True or False"):
        PruneSettings.from_config(dict(evaluate="yes"))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(frame=3), r"unknown key 'frame' in the config's prune\.repair section; did you mean 'frames'"),
        (dict(frames=0), r"prune\.repair\.frames = 0 must be at least 1"),
        (dict(ridge=0), r"prune\.repair\.ridge = 0 must be greater than 0"),
        (dict(keep_raw=1), r"prune\.repair\.keep_raw = 1 must be True or False"),
        (60, r"prune\.repair = 60 must be True, False or a dict such as"),
    ],
)
def test_bad_repair_settings_are_named(section, message):
    with pytest.raises(MdpError, match=message):
        PruneSettings.from_config(dict(repair=section))


def test_repair_is_on_by_default_and_can_be_switched_off():
    repairing = PruneSettings.from_config({}).repairing
    assert repairing.count(6 * 704 * 256) == 8 and repairing.count(224 * 224) == 159 and repairing.count(9) == 256
    assert PruneSettings.from_config(dict(repair=dict(frames=60))).repairing.count(9) == 60
    assert PruneSettings.from_config(dict(repair=False)).repairing is None
