"""Deployment folders appear complete or not at all, and touch nothing that is not theirs."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.files import check_target_file, write_error
from mdp_mmdet3d.runtime.manifest import MANIFEST_FILE
from mdp_mmdet3d.together import about, replace_folder

OURS = (
    MANIFEST_FILE,
    "image_encoder.onnx",
    "position_embedding.onnx",
    "head.onnx",
    "model.onnx",
    "init_memory.npz",
    "init_memory.json",
    "mdp_runtime.pyz",
    "engines.json",
    "*.engine",
    "*.timing.cache",
    ".mdp-part/",
    ".mdp-old/",
)
"""What export and engine builder write into a deployment folder, whatever its manifest lists."""
_PART = ".mdp-part"


@contextmanager
def new_deployment(out_dir: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside ``out_dir`` that replaces it only if the block succeeds.

    Raises:
        DeploymentError: ``out_dir`` holds something that is not a deployment's, see `check_target`.
        WriteError: The folder cannot be written.
    """
    out_dir = Path(out_dir)
    check_target(out_dir)
    with part_folder(out_dir) as part:
        yield part
        replace_folder(part, out_dir)


@contextmanager
def part_folder(out_dir: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside ``out_dir`` for what is on the way there; removed at the end.

    Errors name ``out_dir`` instead of it.

    Raises:
        WriteError: The folder cannot be written.
    """
    out_dir = Path(out_dir)
    check_target_file(out_dir / MANIFEST_FILE)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out_dir)
        part = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.{os.getpid()}.", suffix=_PART, dir=out_dir.parent))
        part.chmod(0o755)
    except OSError as error:
        raise write_error(out_dir, error) from error
    try:
        with about(out_dir, part):
            yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_target(out_dir: str | Path) -> None:
    """Raise `DeploymentError` if ``out_dir`` holds anything that is not an earlier deployment's: it would be lost."""
    out_dir = Path(out_dir)
    if not out_dir.exists():
        return
    if not out_dir.is_dir():
        raise DeploymentError(f"{out_dir} exists and is no deployment folder; give another one or remove it")
    names = [path.name + ("/" if path.is_dir() else "") for path in out_dir.iterdir()]
    if names and MANIFEST_FILE not in names:
        raise DeploymentError(f"{out_dir} exists and is no deployment folder; give another one or remove it")
    listed = _listed(out_dir / MANIFEST_FILE) if names else ()
    foreign = [name for name in names if name not in listed and not any(fnmatchcase(name, item) for item in OURS)]
    if foreign:
        raise DeploymentError(
            f"{out_dir} holds files that no export wrote and that would be lost: {', '.join(sorted(foreign)[:5])}. "
            "Move them, or give another folder"
        )


def _listed(manifest: Path) -> tuple[str, ...]:
    """Files that a manifest lists; of one that is damaged, none."""
    try:
        return tuple(json.loads(manifest.read_text(encoding="utf-8"))["checksums"])
    except (OSError, ValueError, LookupError, TypeError):
        return ()


def _remove_abandoned(out_dir: Path) -> None:
    """Remove what earlier exports to ``out_dir`` left that were killed."""
    prefix = f".{out_dir.name}."
    for path in out_dir.parent.glob(f"{prefix}*{_PART}"):
        process = path.name[len(prefix) :].partition(".")[0]
        if process.isdigit() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(path, ignore_errors=True)
