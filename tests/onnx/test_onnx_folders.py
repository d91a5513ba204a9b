"""A deployment replaces an earlier one, and nothing else."""

from __future__ import annotations

import errno
import os

import pytest

from mdp_mmdet3d.errors import DeploymentError, WriteError
from mdp_mmdet3d.files import write_json, writing
from mdp_mmdet3d.onnx.folders import new_deployment


def deploy(folder, name="head.onnx", checksums=("head.onnx",)):
    with new_deployment(folder) as part:
        (part / name).write_text("new")
        write_json(part / "deployment.json", {"checksums": dict.fromkeys(checksums, "")})


def test_neighbours_are_kept_and_nothing_is_left_behind(tmp_path):
    names = ["pruned.old", "pruned.part", "pruned.fp32", "pruned.float32", ".pruned.mine"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    for _ in range(2):
        deploy(tmp_path / "pruned")
    assert {path.name for path in tmp_path.iterdir()} == {*names, "pruned"}
    assert all((tmp_path / name / "mine").read_text() == "mine" for name in names)


@pytest.mark.parametrize("foreign", ["notes.txt", "runs/fps.json"])
def test_files_of_the_user_in_an_earlier_deployment_are_not_deleted(tmp_path, foreign):
    folder = tmp_path / "pruned"
    deploy(folder)
    (folder / foreign).parent.mkdir(exist_ok=True)
    (folder / foreign).write_text("mine")
    with pytest.raises(DeploymentError, match=rf"no export wrote.*{foreign.partition('/')[0]}"):
        deploy(folder)
    assert (folder / foreign).read_text() == "mine" and (folder / "head.onnx").is_file()


def test_what_export_and_engine_builder_wrote_is_replaced(tmp_path):
    folder = tmp_path / "pruned"
    deploy(folder, "extra.onnx", ("extra.onnx",))
    for name in ("mdp_runtime.pyz", "engines.json", "head.sm86.engine", "sm86.timing.cache"):
        (folder / name).write_text("ours")
    deploy(folder)
    assert {path.name for path in folder.iterdir()} == {"head.onnx", "deployment.json"}


def test_a_damaged_deployment_is_replaced(tmp_path):
    folder = tmp_path / "pruned"
    deploy(folder)
    (folder / "deployment.json").write_text("{")
    deploy(folder)
    assert (folder / "head.onnx").read_text() == "new"


def test_what_a_killed_export_left_is_removed_and_a_running_one_is_not(tmp_path):
    dead = tmp_path / ".pruned.4194303.abc.mdp-part"  # above the largest process number of most systems
    alive = tmp_path / f".pruned.{os.getpid()}.abc.mdp-part"
    for path in (dead, alive):
        path.mkdir()
    deploy(tmp_path / "pruned")
    assert not dead.exists() and alive.exists()


def test_a_full_disk_leaves_the_earlier_one_and_is_told_of_the_target(tmp_path):
    folder = tmp_path / "pruned"
    deploy(folder)
    with pytest.raises(WriteError) as error, new_deployment(folder) as part, writing(part / "inner" / "head.onnx"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(error.value) == (f"cannot write {folder}: No space left on device; make room on that disk and run again")
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]
    assert (folder / "head.onnx").read_text() == "new"


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="file is a file"):
        deploy(tmp_path / "file" / "pruned")
    with pytest.raises(DeploymentError, match="no deployment folder"):
        deploy(tmp_path / "file")
    with pytest.raises(DeploymentError, match="no deployment folder"):
        deploy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
