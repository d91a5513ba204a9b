from __future__ import annotations

import pytest

from .hook_trainings import make_config  # noqa: F401


@pytest.fixture(scope="session")
def tiny_job_config(tmp_path_factory, tiny_config):
    """The main job's config with a tiny StreamPETR and a tiny miniature nuScenes; not to be changed."""
    from mmengine.config import Config

    from mdp_mmdet3d.simdata.mini_nuscenes import MiniNuScenesSpec, write_mini_nuscenes

    root = tmp_path_factory.mktemp("nuscenes") / "mini"
    write_mini_nuscenes(root, MiniNuScenesSpec(scenes=2, frames=3, image_size=(384, 216), object_count=12))
    config = Config.fromfile("configs/streampetr_mdp.py")
    config.model = tiny_config()
    for key in ("importance_dataloader", "test_dataloader", "val_dataloader"):
        dataset = config[key].dataset
        dataset.data_root = str(root)
        for step in dataset.pipeline:
            if step["type"] == "ResizeCropImages":
                step["final_shape"] = (64, 192)
    config.prune.update(
        frames=2, input_size=(64, 192), rounds=4, fit_networks=2, refinements=0, max_options=4, budget=0.6
    )
    return config
