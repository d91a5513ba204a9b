"""Deployment folders appear complete or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.files import writing
from mdp_mmdet3d.runtime.manifest import MANIFEST_FILE
from mdp_mmdet3d.together import replace_folder


@contextmanager
def new_deployment(out_dir: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside ``out_dir`` that replaces it only if the block succeeds."""
    out_dir = Path(out_dir)
    part = out_dir.with_name(out_dir.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with writing(out_dir):
            part.mkdir(parents=True)
            yield part
            replace_folder(part, out_dir)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_target(out_dir: str | Path) -> None:
    """Raise `DeploymentError` if ``out_dir`` exists, is not empty and holds something else than a deployment."""
    out_dir = Path(out_dir)
    if out_dir.exists() and not (out_dir / MANIFEST_FILE).is_file() and (out_dir.is_file() or any(out_dir.iterdir())):
        raise DeploymentError(f"{out_dir} exists and is no deployment folder; give another one or remove it")
