"""Files that belong together: all new, or all as they were, wherever the disk refuses."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from mdp_mmdet3d.errors import WriteError
from mdp_mmdet3d.files import atomic_path, check_target_file, write_json, writing
from mdp_mmdet3d.together import OLD, PART, appear_together, new_folder, replace_folder

NAMES = ("a.txt", "b.txt", "onnx/pruned")


def write(folder: Path, text: str, names: tuple[str, ...] = NAMES) -> None:
    for name in names:
        path = folder / name
        if name == "onnx/pruned":
            path = path / f"{text}.onnx"  # another file name: none of the earlier may stay
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "old")
    write(tmp_path / "onnx" / "dense", "kept", ("c.txt",))
    (tmp_path / "other.txt").write_text("kept")
    return tmp_path


OTHERS = {"onnx/dense/c.txt": "kept", "other.txt": "kept"}
NEW = {"a.txt": "new", "b.txt": "new", "onnx/pruned/new.onnx": "new", **OTHERS}


def test_new_files_replace_all_of_the_old_and_nothing_else(folder) -> None:
    with appear_together(folder, NAMES) as part:
        write(part, "new")
        assert content(folder)["a.txt"] == "old"
    assert content(folder) == NEW and not list(folder.glob(".*"))


def test_what_is_not_written_again_goes_with_the_old(folder) -> None:
    with appear_together(folder, NAMES) as part:
        write(part, "new", ("a.txt",))
    assert content(folder) == {"a.txt": "new", **OTHERS}


@pytest.mark.parametrize(("earlier", "at"), [*((True, i) for i in range(7)), *((False, i) for i in range(6))])
def test_a_move_that_fails_leaves_everything_as_it_was(folder, monkeypatch, earlier, at) -> None:
    if not earlier:
        for name in ("b.txt", "onnx/pruned/old.onnx"):
            (folder / name).unlink()
    before, rename, moves = content(folder), Path.rename, []

    def refusing(source: Path, target: Path) -> Path:
        moves.append(source)
        if len(moves) == at + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(WriteError, match="No space left on device"), appear_together(folder, NAMES) as part:
        write(part, "new")
    assert content(folder) == before and not list(folder.glob(".*"))


def test_an_error_of_the_block_is_passed_on_and_nothing_changes(folder) -> None:
    before = content(folder)
    with pytest.raises(KeyError), appear_together(folder, NAMES) as part:
        write(part, "new")
        raise KeyError("x")
    with pytest.raises(ValueError, match=r"stray\.txt is none of a\.txt"), appear_together(folder, NAMES) as part:
        (part / "stray.txt").touch()
    assert content(folder) == before


@pytest.mark.parametrize("moved", range(4))
def test_after_a_kill_while_moving_the_old_files_come_back(folder, moved) -> None:
    before = content(folder)
    write(folder / PART, "new")
    for name in NAMES[:moved]:  # what the killed process had done
        (folder / OLD / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(folder / OLD / name)
        (folder / PART / name).rename(folder / name)
    with pytest.raises(KeyError), appear_together(folder, NAMES):
        raise KeyError("nothing is written this time")
    assert content(folder) == before


def test_a_full_disk_is_one_clear_error_that_names_the_file(folder, monkeypatch) -> None:
    before = content(folder)

    def full(self: Path, text: str, **_) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(WriteError) as error:
        patch.setattr(Path, "write_text", full)
        with appear_together(folder, NAMES) as part:
            write_json(part / "a.txt", {})
    assert str(error.value) == (
        f"cannot write {folder / 'a.txt'}: No space left on device; make room on that disk and run again. "
        "The files that belong together with it are as they were"
    )
    assert content(folder) == before


def test_only_refused_writes_become_write_errors(tmp_path) -> None:
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        with pytest.raises(WriteError, match="cannot write x"), writing("x"):
            raise OSError(code, os.strerror(code))
    with pytest.raises(FileNotFoundError), writing("x"):
        raise FileNotFoundError(errno.ENOENT, "no such file")
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="give a folder that can be written to"), atomic_path(tmp_path / "file" / "x"):
        pass


def test_a_folder_that_cannot_be_replaced_stays(folder, tmp_path) -> None:
    old = folder / "onnx" / "dense"
    with pytest.raises(FileNotFoundError):
        replace_folder(folder / "absent", old)
    assert content(old) == {"c.txt": "kept"}
    replace_folder(folder / "onnx" / "pruned", old)
    assert content(old) == {"old.onnx": "old"} and not list(old.parent.glob("*.old"))


def test_a_new_folder_is_complete_or_not_there_and_errors_name_it(tmp_path) -> None:
    target = tmp_path / "data"
    for _ in range(2):
        with (
            pytest.raises(WriteError, match=rf"^cannot write {target}: No space left on device"),
            new_folder(target) as part,
        ):
            write(part, "new")
            with writing(part / "a.txt"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert not list(tmp_path.iterdir())
    (tmp_path / f".data{PART}").mkdir()  # of a run that was killed
    (tmp_path / f".data{PART}" / "half.txt").write_text("half")
    with new_folder(target) as part:
        write(part, "new", ("a.txt",))
    assert content(tmp_path) == {"data/a.txt": "new"}


def test_a_read_only_file_system_is_named_before_the_work_and_by_it(tmp_path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system needs root")
    refused = rf"^cannot write {tmp_path}.*: Read-only file system; give a folder that can be written to"
    try:
        with pytest.raises(WriteError, match=refused):
            check_target_file(tmp_path / "new" / "x.json")
        with pytest.raises(WriteError, match=refused):
            write_json(tmp_path / "x.json", {})
        with pytest.raises(WriteError, match=refused), new_folder(tmp_path / "data"):
            pass
        with pytest.raises(WriteError, match=refused), appear_together(tmp_path / "run", NAMES):
            pass
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
