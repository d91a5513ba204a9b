"""A tiny StreamPETR (ResNet-18 of width 16, 64x176 images, three decoder layers), its engines and a stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mdp_mmdet3d.runtime.stream import Frame

CLASS_NAMES = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)
INPUT_SIZE = (64, 176)
BASE = Path(__file__).resolve().parents[1] / "configs/_base_/models/streampetr_r50_704x256_428q.py"


def tiny_config() -> dict:
    from mmengine.config import Config

    config = Config.fromfile(BASE).model
    config.img_backbone.update(depth=18, base_channels=16)
    config.img_neck.in_channels = [64, 128]
    config.pts_bbox_head.update(num_query=60, num_propagated=16, memory_len=64, topk_proposals=16)
    config.pts_bbox_head.decoder.update(num_layers=3, ffn_hidden_dims=512)
    config.bbox_coder.max_num = 50
    return config


def build_tiny(seed: int = 0) -> torch.nn.Module:
    from mmdet3d.registry import MODELS

    torch.manual_seed(seed)
    model = MODELS.build(tiny_config())
    # Constructors leave norms, MLNs and class biases at values that hide mistakes.
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("bias", "running_mean")):
                value.add_(0.1 * torch.randn_like(value))
            elif "running_var" in name or (name.endswith("weight") and value.dim() == 1):
                value.mul_(0.8 + 0.4 * torch.rand_like(value))
            elif "gamma.weight" in name or "beta.weight" in name:
                value.copy_(0.05 * torch.randn_like(value))
            elif name.endswith("cls_branches.0.6.weight"):  # scores that differ by more than rounding
                value.mul_(10.0)
    model.eval()
    return model


def make_frames(count: int = 4, reset_at: int = 2, seed: int = 3) -> list[Frame]:
    """A drive on a curve far from the global origin; the scene changes at frame ``reset_at``."""
    rng = np.random.default_rng(seed)
    yaws = np.deg2rad([0.0, -55.0, 55.0, 180.0, 110.0, -110.0])
    intrinsics, lidar2img = [], []
    for index, yaw in enumerate(yaws):
        camera = np.diag([139.0 - 20.0 * (index == 3), 139.0, 1.0, 1.0])
        camera[:2, 2] = 88.0 + index, 20.0
        lidar2cam = np.eye(4)
        lidar2cam[:3, :3] = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ rotation_z(-yaw)[:3, :3]
        lidar2cam[:3, 3] = [0.05 * index, -0.35, -0.6]
        intrinsics.append(camera)
        lidar2img.append(camera @ lidar2cam)
    frames = []
    for index in range(count):
        pose = rotation_z(0.7 + 0.06 * index)
        pose[:3, 3] = [411.3 + 3.1 * index, 1180.9 + 1.7 * index, 1.8]
        frames.append(
            Frame(
                img=rng.standard_normal((6, 3, *INPUT_SIZE)).astype(np.float32),
                ego_pose=pose,
                timestamp=1533151603.547590 + 0.5 * index + 0.013 * index**2,
                intrinsics=np.stack(intrinsics),
                lidar2img=np.stack(lidar2img),
                scene_token="first" if index < reset_at else "second",
            )
        )
    return frames


def rotation_z(angle: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return matrix


@pytest.fixture(scope="session")
def deployed_model() -> torch.nn.Module:
    return build_tiny()


@pytest.fixture(scope="session")
def tiny_deployment(deployed_model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from projects.streampetr.export import export_streampetr

    folder = tmp_path_factory.mktemp("deploy") / "dense"
    export_streampetr(deployed_model, folder, class_names=CLASS_NAMES, input_size=INPUT_SIZE, weights="random")
    return folder


@pytest.fixture(scope="session")
def stream() -> list[Frame]:
    return make_frames()
