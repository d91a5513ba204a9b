"""Fixtures that every test folder shares."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real nuScenes frame, recorded StreamPETR numbers and solver instances."""
    path = Path(os.environ.get("MDP_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"shared test data not found at {path}; set MDP_SHARED_DATA")
    return path
