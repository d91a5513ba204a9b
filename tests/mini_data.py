from __future__ import annotations

from pathlib import Path

import pytest

from mdp_mmdet3d.simdata.mini_nuscenes import MiniNuScenesSpec, write_mini_nuscenes

SMALL = MiniNuScenesSpec(scenes=3, frames=3, seed=3, image_size=(320, 180))


@pytest.fixture(scope="session")
def mini_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature nuScenes with small images: 2 + 1 scenes of 3 key frames."""
    return write_mini_nuscenes(tmp_path_factory.mktemp("mini") / "nuscenes", SMALL)


@pytest.fixture(scope="session")
def mini_nusc(mini_root: Path):
    from nuscenes.nuscenes import NuScenes

    return NuScenes(version="v1.0-mini", dataroot=str(mini_root), verbose=False)
