"""Fixtures that every test folder shares."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from .mini_data import mini_nusc, mini_root  # noqa: F401  (fixtures)
from .tiny_deployment import deployed_model, stream, tiny_deployment  # noqa: F401  (fixtures)

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: two workers then end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test begins in MMDetection3D's scope, whatever ran before it in this process."""
    if "mmengine" in sys.modules:
        from mmengine.registry import DefaultScope

        DefaultScope._instance_dict.clear()
        DefaultScope.get_instance("tests", scope_name="mmdet3d")


@pytest.fixture(autouse=True)
def subnormal_numbers():
    """Tools and ONNX Runtime sessions flush denormals for the whole process; the next test has them again."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def tiny_config():
    """Config of a StreamPETR with all kinds of parts and few of each: R18 of base width 16, 64x176, 3 layers."""
    from mmengine import Config

    def make():
        config = Config.fromfile(ROOT / "configs/_base_/models/streampetr_r50_704x256_428q.py").model
        config.img_backbone.update(depth=18, base_channels=16)
        config.img_neck.in_channels = [64, 128]
        config.pts_bbox_head.update(num_query=60, memory_len=64, topk_proposals=16, num_propagated=16)
        config.pts_bbox_head.decoder.update(num_layers=3, ffn_hidden_dims=512)
        return config

    return make


@pytest.fixture
def tiny_model(tiny_config):
    """A dense tiny StreamPETR with random weights, in evaluation mode."""
    import mmdet3d.models  # noqa: F401
    import torch
    from mmdet3d.registry import MODELS
    from mmengine.registry import DefaultScope, init_default_scope

    if DefaultScope.get_current_instance() is None:
        init_default_scope("mmdet3d")
    torch.manual_seed(0)
    model = MODELS.build(tiny_config())
    generator = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():  # batch-norm statistics that are not 0 and 1
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.8, 1.2, generator=generator)
    for name, parameter in model.named_parameters():  # conditional norms start at 0, biases too
        if name.endswith(("gamma.weight", "beta.weight", "bias")):
            parameter.data += torch.empty_like(parameter).normal_(0, 0.05, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_frames():
    """Batches of a stream of frames as MMEngine's dataloaders yield them: 6 random 64x176 images with ground truth."""
    import numpy as np
    import torch
    from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes
    from mmengine.structures import InstanceData

    def make(count: int = 3, seed: int = 0) -> list[dict]:
        rng = np.random.default_rng(seed)
        intrinsics = np.tile(np.array([[140.0, 0, 88, 0], [0, 140, 20, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), (6, 1, 1))
        extrinsics = np.tile(np.eye(4), (6, 1, 1))
        for i, yaw in enumerate(np.deg2rad([0, -55, 55, 180, 110, -110])):
            c, s = np.cos(-yaw), np.sin(-yaw)
            rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
            extrinsics[i, :3, :3] = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ rotation
            extrinsics[i, :3, 3] = (0.05 * i, -0.35, -0.6)
        batches = []
        for t in range(count):
            pose = np.eye(4)
            pose[:2, 3] = (1.5 * t, 0.1 * t)
            boxes = np.concatenate(
                [
                    rng.uniform(-30, 30, (5, 2)),
                    rng.uniform(-2, 0, (5, 1)),
                    rng.uniform(1, 4, (5, 3)),
                    rng.uniform(-3, 3, (5, 1)),
                    rng.normal(size=(5, 2)),
                ],
                axis=1,
            )
            sample = Det3DDataSample(
                metainfo=dict(
                    intrinsics=intrinsics.astype(np.float32),
                    extrinsics=extrinsics.astype(np.float32),
                    lidar2img=(intrinsics @ extrinsics).astype(np.float32),
                    ego_pose=pose.astype(np.float32),
                    ego_pose_inv=np.linalg.inv(pose).astype(np.float32),
                    timestamp=1533151603.5 + 0.5 * t,
                    prev_exists=t > 0,
                    scene_token="scene",
                    sample_idx=t,
                    img_shape=(64, 176),
                    pad_shape=(64, 176),
                )
            )
            sample.gt_instances_3d = InstanceData(
                bboxes_3d=LiDARInstance3DBoxes(torch.tensor(boxes, dtype=torch.float32), box_dim=9),
                labels_3d=torch.tensor(rng.integers(0, 10, 5)),
            )
            image = torch.tensor(rng.integers(0, 255, (6, 3, 64, 176)), dtype=torch.float32)
            batches.append(dict(inputs=dict(img=[image]), data_samples=[sample]))
        return batches

    return make


@pytest.fixture(scope="session")
def random_kept():
    """Function (space, rng, p_remove) -> kept elements and removed blocks: a random plan of a space."""

    def make(space, rng, p_remove: float = 0.2):
        kept = {}
        for d in space.dimensions:
            count = int(rng.choice(d.options))
            kept[d.name] = tuple(
                tuple(sorted(rng.choice(d.size, count, replace=False).tolist())) for _ in range(d.copies)
            )
        removed = {b.name for b in space.blocks if rng.random() < p_remove}
        removed |= {b.name for b in space.blocks if b.parent in removed}
        return kept, frozenset(removed)

    return make
