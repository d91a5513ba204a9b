"""Files that belong together appear together, or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mdp_mmdet3d.errors import MdpError, WriteError
from mdp_mmdet3d.files import check_target_file, write_error, writing

PART, OLD = ".mdp-part", ".mdp-old"


@contextmanager
def appear_together(folder: str | Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield an empty folder inside ``folder``; what the block writes there moves into ``folder`` if it succeeds.

    Everything is written before the first file moves, and moving takes no room: a full disk leaves ``folder`` as it
    was. If a process is killed while they move, the next call puts the earlier ones back first.

    Args:
        folder: Where the files belong; made if it is not there.
        names: All files and folders that belong together, relative to ``folder``. Those that the block does not write
            are removed: they belonged to the earlier ones.

    Raises:
        WriteError: The folder cannot be written.
        ValueError: The block wrote something that is not in ``names``.
    """
    folder = Path(folder)
    part, old = folder / PART, folder / OLD
    try:
        _put_back(folder, old, names)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        with writing(folder):
            yield part
            _check_names(part, names)
            _exchange(part, folder, old, names)
    except WriteError as error:
        message = str(error).replace(f"{part}{os.sep}", f"{folder}{os.sep}")
        raise WriteError(f"{message}. The files that belong together with it are as they were") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside ``target`` that takes its place if the block succeeds, and is gone if not.

    Raises:
        WriteError: It cannot be written.
    """
    target = Path(target)
    part = target.absolute().with_name(f".{target.absolute().name}{PART}")
    with about(target, part):
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        check_target_file(part / PART)
        part.mkdir(parents=True)
        try:
            yield part
            replace_folder(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def about(target: Path, part: Path) -> Iterator[None]:
    """Let errors of the block name ``target`` where they name files below ``part``, in which it is made."""
    try:
        with writing(target):
            yield
    except MdpError as error:
        error.args = tuple(re.sub(rf"{re.escape(str(part))}[^\s:,;]*", str(target), str(text)) for text in error.args)
        raise


def replace_folder(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``, which may exist; if that fails, it stays as it was."""
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=OLD, dir=target.parent))
    if target.exists():
        target.rename(old / target.name)
    try:
        source.rename(target)
    except OSError:
        _move(old / target.name, target)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(part: Path, folder: Path, old: Path, names: Sequence[str]) -> None:
    new = [name for name in names if os.path.lexists(part / name)]
    try:
        for name in names:
            _move(folder / name, old / name)
            _move(part / name, folder / name)
        _move(old, part / OLD)  # from here on the earlier ones are not put back
    except BaseException:
        for name in new:
            if not os.path.lexists(part / name):
                _move(folder / name, part / name)
        _put_back(folder, old, names)
        raise


def _put_back(folder: Path, old: Path, names: Sequence[str]) -> None:
    """Undo an exchange that did not finish."""
    for name in names:
        if os.path.lexists(old / name):
            _remove(folder / name)
            _move(old / name, folder / name)
    shutil.rmtree(old, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    if os.path.lexists(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_names(part: Path, names: Sequence[str]) -> None:
    known = {part / name for name in names}
    for path in part.rglob("*"):
        if path.is_file() and not known.intersection((path, *path.parents)):
            raise ValueError(f"{path.relative_to(part)} is none of {', '.join(names)}")
