"""A small StreamPETR, with the weights and inputs of the recorded reference where those are available."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from mmdet3d.registry import MODELS
from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes
from mmengine.structures import InstanceData

import projects.streampetr  # noqa: F401  (registers the model)

from ..data_files import data_path

NUM_CAMERAS, HEIGHT, WIDTH = 6, 64, 96


def small_config(**head) -> dict:
    """R18 of base width 16; ``head`` overrides arguments of the head."""
    return dict(
        type="StreamPETR",
        data_preprocessor=dict(
            type="Det3DDataPreprocessor",
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            bgr_to_rgb=True,
            pad_size_divisor=32,
        ),
        img_backbone=dict(
            type="mmdet.ResNet",
            depth=18,
            base_channels=16,
            out_indices=(2, 3),
            norm_cfg=dict(type="BN2d", requires_grad=False),
            norm_eval=True,
        ),
        img_neck=dict(type="CPFPN", in_channels=[64, 128], out_channels=256),
        pts_bbox_head=dict(
            type="StreamPETRHead",
            decoder=dict(type="StreamPETRDecoder", num_layers=3, ffn_hidden_dims=512, dropout=0.0, self_attn_drop=0.0),
        )
        | dict(num_query=60, num_propagated=16, memory_len=64, topk_proposals=16)
        | head,
        bbox_coder=dict(type="StreamPETRBoxCoder", max_num=50),
        criterion=dict(type="StreamPETRLoss"),
        denoising=dict(type="DenoisingGenerator"),
    )


def spread_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights with which predictions differ from query to query and every path matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "reference_points" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
            elif parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.2 / fan_in**0.5)
            else:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def build_small() -> Callable[..., torch.nn.Module]:
    """Function that builds the small detector in evaluation mode, with weights that are the same every time."""

    def build(**head) -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of what `spread_weights` adds to and does not replace
            model = MODELS.build(small_config(**head))
        spread_weights(model)
        return model.eval()

    return build


@pytest.fixture
def make_sample() -> Callable[..., Det3DDataSample]:
    """Function that makes a data sample of a plausible rig; keywords override its metainfo."""

    def make(t: int = 0, **overrides) -> Det3DDataSample:
        intrinsics = np.tile(np.eye(4), (NUM_CAMERAS, 1, 1))
        extrinsics = np.tile(np.eye(4), (NUM_CAMERAS, 1, 1))
        for camera in range(NUM_CAMERAS):
            intrinsics[camera, :2, :3] = [[70.0 + camera, 0, WIDTH / 2], [0, 70.0 + camera, HEIGHT / 2]]
            yaw = 2 * np.pi * camera / NUM_CAMERAS
            forward = np.array([np.cos(yaw), np.sin(yaw), 0.0])
            right = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
            extrinsics[camera, :3, :3] = np.stack((right, [0.0, 0.0, -1.0], forward))
        ego_pose = np.eye(4)
        ego_pose[:3, 3] = [600.0 + 2.0 * t, 1600.0 + 0.5 * t, 1.8]
        sample = Det3DDataSample()
        sample.set_metainfo(
            dict(
                intrinsics=intrinsics,
                extrinsics=extrinsics,
                lidar2img=intrinsics @ extrinsics,
                ego_pose=ego_pose,
                ego_pose_inv=np.linalg.inv(ego_pose),
                timestamp=1533151603.5 + 0.5 * t,
                prev_exists=t > 0,
                scene_token="scene-a",
                sample_idx=t,
            )
            | overrides
        )
        sample.gt_instances_3d = InstanceData(
            bboxes_3d=LiDARInstance3DBoxes(
                [[10.0, 5.0, -1.0, 4.0, 2.0, 1.5, 0.3, 1.0, 0.0], [-20.0, 8.0, 0.0, 0.8, 0.7, 1.8, 2.0, 0.0, 0.5]],
                box_dim=9,
            ),
            labels_3d=torch.tensor([0, 8]),
        )
        return sample

    return make


@pytest.fixture
def make_images() -> Callable[..., torch.Tensor]:
    """Function that makes normalised images (B, N, 3, H, W)."""

    def make(t: int = 0, batch: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 + t)
        return torch.randn(batch, NUM_CAMERAS, 3, HEIGHT, WIDTH, generator=generator)

    return make


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Folder of the numbers recorded from the public implementation."""
    return data_path("streampetr_reference")


@pytest.fixture(scope="session")
def rules(reference_dir: Path) -> ModuleType:
    """Rules that make the reference's weights, inputs and ground truth."""
    spec = importlib.util.spec_from_file_location("streampetr_reference_rules", reference_dir / "rules.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def recorded(reference_dir: Path) -> dict[str, np.ndarray]:
    """The recorded numbers."""
    with np.load(reference_dir / "tiny.npz") as data:
        return {key: data[key] for key in data.files}


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Names and shapes of a state-dict list."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    return {key: ast.literal_eval(shape) for key, shape, _ in rows}


@pytest.fixture(scope="session")
def tiny_shapes(reference_dir: Path) -> dict[str, list[int]]:
    """State-dict names and shapes of the reference's configuration, auxiliary head included."""
    return read_shapes(reference_dir / "tiny_state_dict.tsv")


@pytest.fixture(scope="session")
def r50_shapes(reference_dir: Path) -> dict[str, list[int]]:
    """State-dict names and shapes of the official R50 428-query checkpoint."""
    return read_shapes(reference_dir / "r50_428q_state_dict.tsv")


@pytest.fixture(scope="session")
def reference_state(rules: ModuleType, tiny_shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The reference's weights by official name, auxiliary head included, constants excluded."""
    return {key: torch.from_numpy(np.asarray(value)) for key, value in rules.fill_state(tiny_shapes).items()}


@pytest.fixture(scope="session")
def build_reference(reference_state: dict[str, torch.Tensor]) -> Callable[..., torch.nn.Module]:
    """Function that builds the reference with its weights; ``auxiliary`` adds the 2D head, keywords are the head's."""

    def build(auxiliary: bool = False, **head) -> torch.nn.Module:
        from projects.streampetr.checkpoint import load_state_dict

        config = small_config(**head)
        if auxiliary:
            config["img_roi_head"] = dict(type="AuxiliaryHead2D")
        model = MODELS.build(config)
        load_state_dict(model, reference_state)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def easy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The easy miniature nuScenes, 2 + 1 scenes of 4 key frames."""
    from mdp_mmdet3d.simdata.mini_nuscenes import easy_spec, write_mini_nuscenes

    return write_mini_nuscenes(tmp_path_factory.mktemp("easy") / "nuscenes", easy_spec(scenes=3, frames=4, seed=5))


@pytest.fixture
def mini_config(easy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """configs/streampetr_mini.py on that data set: 6 iterations, checkpoints every 3, no evaluation."""
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet3d")
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("MINI_NUSCENES_ROOT", str(easy_root))
    config = Config.fromfile(root / "configs" / "streampetr_mini.py")
    config.work_dir = str(tmp_path / "work")
    config.train_cfg.update(max_iters=6, val_interval=100)
    config.train_dataloader.dataset.scene_parts = 1  # streams of four frames, which use the memory
    config.default_hooks.checkpoint.interval = 3
    config.default_hooks.checkpoint.max_keep_ckpts = -1
    config.log_level = "ERROR"
    for key in ("val_dataloader", "val_evaluator", "val_cfg", "test_dataloader", "test_evaluator", "test_cfg"):
        config[key] = None
    return config
