"""A full disk while a plan is written: the earlier plan and all that belongs to it stay, the error is one line."""

from __future__ import annotations

import contextlib
import copy
import errno
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from rich.console import Console

from mdp_mmdet3d.adapters import InputShape, trace_space
from mdp_mmdet3d.checkpoint.load import check_meta
from mdp_mmdet3d.errors import WriteError
from mdp_mmdet3d.files import file_sha256, write_json
from mdp_mmdet3d.runner.job import PruneJob
from mdp_mmdet3d.runner.outputs import PRUNED_FILES, new_pruned_model
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.plan import PruningPlan
from projects.streampetr.export import export_streampetr

CLASSES = list("abcdefghij")
SIZE = (64, 192)


def snapshot(folder: Path) -> dict[str, str]:
    """Checksums of what belongs to the plan."""
    paths = [p for name in PRUNED_FILES for p in (folder / name, *(folder / name).rglob("*"))]
    return {str(p.relative_to(folder)): file_sha256(p) for p in paths if p.is_file()}


def assert_belongs_together(folder: Path) -> str:
    """Hash of the one plan that every file is of."""
    plan = PruningPlan.load(folder / "plan.json")
    check_meta(torch.load(folder / "pruned.pth", weights_only=True)["meta"], plan)
    assert DeploymentManifest.load(folder / "onnx" / "pruned").plan_hash == plan.hash
    assert Config.fromfile(folder / "pruned_config.py").model.plan == str(folder / "plan.json")
    assert {path.name for path in folder.glob(".*")} <= {".lock"}
    assert not list((folder / "onnx").glob(".*"))
    return plan.hash


@contextlib.contextmanager
def refused_write(at: int) -> Iterator[list[str]]:
    """Let the ``at``-th file that is made from here on meet a full disk."""
    made, make = [], tempfile.mkstemp

    def mkstemp(*args, **kwargs):
        made.append(kwargs.get("prefix", ""))
        if len(made) == at + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return make(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", mkstemp)
        yield made


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 96 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def room(disk: Path, size: int) -> Iterator[None]:
    """Leave ``size`` bytes of a disk."""
    state = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(bytes(max(0, state.f_bavail * state.f_frsize - size)))
    try:
        yield
    finally:
        filler.unlink()


@pytest.fixture
def write_plan(tiny_model, tiny_config, random_kept) -> Callable[[Path, int], str]:
    """Function (folder, seed) that writes a random plan as the pruning job does; returns its hash."""
    space = trace_space(tiny_model, InputShape(6, *SIZE))
    config = Config(dict(model=tiny_config().to_dict(), default_scope="mmdet3d"))

    def write(folder: Path, seed: int) -> str:
        plan = PruningPlan.from_kept(space, *random_kept(space, np.random.default_rng(seed)))
        pruned = apply_plan(copy.deepcopy(tiny_model), plan)
        with new_pruned_model(folder, pruned, plan, "random", config, CLASSES) as part:
            write_json(part / "problem.npz", {"stands in for": plan.hash})
            export_streampetr(
                pruned, part / "onnx" / "pruned", class_names=CLASSES, input_size=SIZE, plan_hash=plan.hash
            )
        return plan.hash

    return write


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_file_leaves_the_earlier_plan(write_plan, tmp_path) -> None:
    first = write_plan(tmp_path, 0)
    write_json(tmp_path / "report.json", {"plan_hash": first})
    before, at = snapshot(tmp_path), 0
    while True:
        with refused_write(at) as made:
            try:
                second = write_plan(tmp_path, 1)
                break
            except WriteError as error:
                assert "No space left on device" in str(error) and str(tmp_path) in str(error)
        assert len(made) == at + 1 and snapshot(tmp_path) == before
        assert assert_belongs_together(tmp_path) == first
        at += 1
    assert at >= 7, made  # plan, checkpoint, config, problem, the memory's two files, manifest
    assert assert_belongs_together(tmp_path) == second != first
    assert not (tmp_path / "report.json").exists()  # it was of the first plan


@pytest.mark.slow
def test_a_disk_that_is_really_full_leaves_the_earlier_plan(write_plan, small_disk) -> None:
    folder = small_disk / "run"
    first = write_plan(folder, 0)
    before, failures = snapshot(folder), []
    needed = sum((folder / name).stat().st_size for name in before)
    for share in (0.0, 0.001, 0.2, 0.4, 0.6, 0.8):
        with room(small_disk, int(share * needed)), pytest.raises(WriteError) as error:
            write_plan(folder, 1)
        failures.append(str(error.value).split(":")[0].removeprefix(f"cannot write {folder}").strip("/"))
        assert "No space left on device" in str(error.value)
        assert snapshot(folder) == before and assert_belongs_together(folder) == first
    assert {"pruned.pth", "onnx/pruned"} <= set(failures)  # the disk was full at one as at the other
    with room(small_disk, 3 * needed):
        assert write_plan(folder, 1) == assert_belongs_together(folder) != first


@pytest.mark.slow
def test_pruning_to_another_budget_on_a_full_disk(tiny_job_config, small_disk, tmp_path, monkeypatch, capsys) -> None:
    config, work_dir = copy.deepcopy(tiny_job_config), small_disk / "run"
    PruneJob(config, PruneSettings.from_config(config.prune), work_dir, None, Console(quiet=True)).run()
    first, before = assert_belongs_together(work_dir), snapshot(work_dir)
    config.dump(tmp_path / "config.py")
    spec = importlib.util.spec_from_file_location("prune_tool", "tools/prune.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    command = ["prune.py", str(tmp_path / "config.py"), "--work-dir", str(work_dir), "--budget", "0.75"]
    monkeypatch.setattr(sys, "argv", command)
    checkpoint = (work_dir / "pruned.pth").stat().st_size
    for left in (0, checkpoint // 2):
        capsys.readouterr()
        with room(small_disk, left):
            assert tool.main() == 2
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert last.startswith("error: cannot write ") and "No space left on device" in last
        assert snapshot(work_dir) == before and assert_belongs_together(work_dir) == first
    assert tool.main() == 0
    assert assert_belongs_together(work_dir) != first
