"""tools/train.py going on with, or starting from, a checkpoint of something else: one line and exit status 2."""

from __future__ import annotations

import copy
import errno
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook

from mdp_mmdet3d.adapters import InputShape, adapter_of, trace_space
from mdp_mmdet3d.runner.outputs import new_pruned_model
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.plan import PruningPlan

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def train(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Function that runs the tool in this process; returns its exit status and its error."""
    spec = importlib.util.spec_from_file_location("train_tool", ROOT / "tools/train.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        capsys.readouterr()
        status = tool.main()
        return status, capsys.readouterr().err.rpartition("error: ")[2].strip()

    return run


@pytest.fixture
def dense(mini_config, tmp_path) -> Path:
    """Config of a dense training of three iterations with a checkpoint after each."""
    mini_config.train_cfg.max_iters = 3
    mini_config.default_hooks.checkpoint.interval = 1
    mini_config.dump(tmp_path / "dense.py")
    return tmp_path / "dense.py"


@pytest.fixture
def pruned(dense, tmp_path, random_kept) -> Path:
    """Work directory with a pruned model of it."""
    config = Config.fromfile(dense)
    model, weights = adapter_of(config, InputShape(6, 64, 176)).build(None)
    space = trace_space(model, InputShape(6, 64, 176))
    plan = PruningPlan.from_kept(space, *random_kept(space, np.random.default_rng(0)))
    with new_pruned_model(tmp_path / "pruned", apply_plan(model, plan), plan, weights, config, config.class_names):
        pass
    return tmp_path / "pruned"


def test_a_dense_config_in_the_folder_of_a_pruned_training_and_the_other_way_round(dense, pruned, tmp_path, train):
    config, work_dir = pruned / "pruned_config.py", tmp_path / "w"
    assert train(config, "--work-dir", work_dir)[0] == 0
    plan = PruningPlan.load(pruned / "plan.json").hash
    status, error = train(dense, "--work-dir", work_dir, "--resume")
    assert status == 2 and "\n" not in error
    assert error == (
        f"checkpoint {work_dir / 'iter_3.pth'} is of the training of a pruned model (plan {plan}), the config "
        "describes the dense one: go on with the pruned_config.py that it was started with, or give another --work-dir"
    )
    assert train(config, "--work-dir", work_dir, "--resume", "--cfg-options", "train_cfg.max_iters=4")[0] == 0
    assert torch.load(work_dir / "iter_4.pth", weights_only=True)["meta"]["mdp_plan"]["hash"] == plan
    status, error = train(dense, "--work-dir", tmp_path / "d", "--cfg-options", f"load_from={pruned / 'pruned.pth'}")
    assert status == 2 and f"pruned.pth is of a pruned model (plan {plan})" in error
    assert train(dense, "--work-dir", tmp_path / "d")[0] == 0
    status, error = train(config, "--work-dir", tmp_path / "d", "--resume")
    assert status == 2 and "does not fit this pruned model" in error


def test_what_is_no_training_to_go_on_with_is_named(dense, pruned, tmp_path, train) -> None:
    assert train(dense, "--work-dir", tmp_path / "d")[0] == 0
    saved = torch.load(tmp_path / "d" / "iter_2.pth", weights_only=True)
    assert train(dense, "--work-dir", tmp_path / "d", "--resume", tmp_path / "d" / "iter_2.pth")[0] == 0
    status, error = train(pruned / "pruned_config.py", "--resume", pruned / "pruned.pth")
    assert (
        status == 2 and "it has no meta.epoch, no meta.iter, no optimizer; it holds meta (dict of 5), state_" in error
    )
    torch.save({**saved, "meta": "by me"}, tmp_path / "meta.pth")
    status, error = train(dense, "--work-dir", tmp_path / "d", "--resume", tmp_path / "meta.pth")
    assert status == 2 and "it has no meta.epoch, no meta.iter; it holds meta (str), state_dict" in error
    torch.save({"nets": saved["state_dict"], "epoch": 3}, tmp_path / "keys.pth")
    status, error = train(dense, "--work-dir", tmp_path / "e", "--cfg-options", f"load_from={tmp_path / 'keys.pth'}")
    assert status == 2 and "keys.pth has no entry" in error and "nets (" in error
    (tmp_path / "half.pth").write_bytes((tmp_path / "d" / "iter_2.pth").read_bytes()[:9999])
    status, error = train(dense, "--work-dir", tmp_path / "d", "--resume", tmp_path / "half.pth")
    assert status == 2 and "half.pth is truncated or no checkpoint; go on from another one" in error
    other = Config.fromfile(dense)
    other.model.pts_bbox_head.decoder.ffn_hidden_dims = 256
    other.dump(tmp_path / "other.py")
    status, error = train(tmp_path / "other.py", "--work-dir", tmp_path / "d", "--resume")
    assert status == 2 and "is of the training of another model" in error and "expected (256,), found (512,)" in error


def test_weights_with_a_meta_that_is_a_string_are_a_start(dense, tmp_path, train, caplog) -> None:
    config = Config.fromfile(dense)
    state = adapter_of(copy.deepcopy(config), InputShape(6, 64, 176)).build(None)[0].state_dict()
    torch.save({"state_dict": state, "meta": "by me"}, tmp_path / "meta.pth")
    assert train(dense, "--work-dir", tmp_path / "d", "--cfg-options", f"load_from={tmp_path / 'meta.pth'}")[0] == 0
    assert "its meta is a str ('by me'), not a dictionary" in caplog.text


def test_a_disk_that_is_full_at_a_checkpoint_ends_a_training_with_one_line(dense, tmp_path, train, monkeypatch) -> None:
    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(CheckpointHook, "_save_checkpoint", full)
    status, error = train(dense, "--work-dir", tmp_path / "d")
    assert status == 2
    assert error == f"cannot write {tmp_path / 'd'}: No space left on device; make room on that disk and run again"


def test_a_disk_that_is_really_full_keeps_the_checkpoints_and_the_training_goes_on(dense, tmp_path, train) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    work_dir, filler = disk / "w", disk / "filler"
    try:
        assert train(dense, "--work-dir", work_dir, "--cfg-options", "train_cfg.max_iters=1")[0] == 0
        first = (work_dir / "iter_1.pth").read_bytes()
        state = os.statvfs(disk)
        filler.write_bytes(bytes(state.f_bavail * state.f_frsize - len(first) // 2))
        status, error = train(dense, "--work-dir", work_dir, "--resume")
        assert status == 2 and error.startswith(f"cannot write {work_dir}: No space left on device; make room"), error
        assert (work_dir / "iter_1.pth").read_bytes() == first
        filler.unlink()
        assert train(dense, "--work-dir", work_dir, "--resume")[0] == 0
        assert torch.load(work_dir / "iter_3.pth", weights_only=True)["meta"]["iter"] == 3
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_second_training_while_one_runs_in_the_folder_is_refused(dense, tmp_path, train, monkeypatch) -> None:
    save, seen = CheckpointHook._save_checkpoint, []

    def second(*arguments: object, **options: object) -> None:
        if not seen:
            seen.append(train(dense, "--work-dir", tmp_path / "d"))
        save(*arguments, **options)

    monkeypatch.setattr(CheckpointHook, "_save_checkpoint", second)
    assert train(dense, "--work-dir", tmp_path / "d")[0] == 0
    ((status, error),) = seen
    assert status == 2 and f"{tmp_path / 'd'} is in use by another run (process {os.getpid()}" in error
    assert (tmp_path / "d" / "iter_3.pth").is_file()


def test_two_pruned_models_train_at_once_each_in_its_own_folder(pruned, tmp_path, train, monkeypatch) -> None:
    other, save, seen = shutil.copytree(pruned, tmp_path / "other"), CheckpointHook._save_checkpoint, []

    def second(*arguments: object, **options: object) -> None:
        if not seen:
            seen.append(None)
            seen[0] = train(other / "pruned_config.py", "--cfg-options", "train_cfg.max_iters=1")
        save(*arguments, **options)

    monkeypatch.setattr(CheckpointHook, "_save_checkpoint", second)
    assert train(pruned / "pruned_config.py")[0] == 0
    assert seen[0][0] == 0, seen[0][1]
    folders = [folder / "training" for folder in (pruned, other)]
    assert [sorted(path.name for path in folder.glob("iter_*.pth")) for folder in folders] == [
        ["iter_1.pth", "iter_2.pth", "iter_3.pth"],
        ["iter_1.pth"],
    ]
