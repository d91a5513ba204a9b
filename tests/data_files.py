"""Where data of the tests lies: in ``tests/data``, or in a folder beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "tests" / "data"
# What is not in the repository, and why; tests/data/README.md says what each of them is.
ELSEWHERE = {
    "nuscenes_frame": "one key frame of nuScenes v1.0-mini, whose licence (CC BY-NC-SA 4.0) keeps it out of here",
    "solver_instances": "an instance that is large, or from published tables whose licence is not known to be free",
}


def shared_folder() -> Path:
    """``$MDP_SHARED_DATA``, or ``../shared/data`` beside the repository."""
    return Path(os.environ.get("MDP_SHARED_DATA", ROOT.parent / "shared" / "data"))


def data_path(name: str) -> Path:
    """The file or folder ``name``, of ``tests/data`` or the shared folder; skips the test where neither has it."""
    for folder in (SHIPPED, shared_folder()):
        if (folder / name).exists():
            return folder / name
    pytest.skip(
        f"{name} is neither in {SHIPPED} nor in {shared_folder()}: "
        f"{ELSEWHERE.get(name.split('/')[0], 'restore it with git checkout tests/data')}; "
        "put it there, or set MDP_SHARED_DATA to a folder that has it (tests/data/README.md)"
    )
