"""What the pruning job starts from: the dense model with its weights, batches with ground truth, frames."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from mdp_mmdet3d.deploy.frames import frame_of
from mdp_mmdet3d.deploy.stream import Frame
from mdp_mmdet3d.engine.slim_model import without_pretrained
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import file_sha256
from projects.streampetr.checkpoint import load_checkpoint

RANDOM = "random"


def build_dense(config: Config, checkpoint: str | None, seed: int = 0) -> tuple[nn.Module, str]:
    """The dense model in evaluation mode, and the identity of its weights.

    Args:
        config: MMEngine config with ``model``.
        checkpoint: Weights to load; without them the model is initialised at random from ``seed``.
        seed: For random weights: equal seeds give equal weights, so that stages can be reused.

    Returns:
        The model, and ``"random"`` or ``"<file name>@<first 16 hex digits of its SHA-256>"``.

    Raises:
        FileFormatError: The checkpoint is missing or damaged.
        StructureMismatchError: It is that of another model.
    """
    init_default_scope(config.get("default_scope", "mmdet3d"))
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - MMEngine's initialisers may draw from it
    model = MODELS.build(copy.deepcopy(without_pretrained(config.model)))
    if checkpoint:
        load_checkpoint(model, checkpoint)
        return model.eval(), f"{Path(checkpoint).name}@{file_digest(Path(checkpoint))}"
    model.init_weights()
    return model.eval(), RANDOM


def data_identity(config: Config) -> str:
    """Path of the importance data set's info file, the same however its root is spelled."""
    dataset = config.get("importance_dataloader", {}).get("dataset", {})
    path = f"{dataset.get('data_root', '')}/{dataset.get('ann_file', '')}"
    return path if "://" in path else str(Path(path).resolve())


def importance_batches(config: Config) -> Iterator[Mapping[str, Any]]:
    """Batches of ``config.importance_dataloader``, in stream order.

    Raises:
        MdpError: The config has no such loader.
        MissingDatasetError: The data set is not there.
    """
    if "importance_dataloader" not in config:
        raise MdpError(
            "the config has no importance_dataloader; inherit configs/_base_/datasets/nuscenes_704x256.py "
            "or define one with ground truth"
        )
    return iter(Runner.build_dataloader(copy.deepcopy(config.importance_dataloader), seed=0))


def deployment_frames(config: Config, model: nn.Module, count: int) -> list[Frame]:
    """The first ``count`` frames of the importance data, preprocessed as a host would feed them."""
    frames = []
    for batch in islice(importance_batches(config), count):
        data = model.data_preprocessor(dict(batch), False)
        pairs = zip(data["inputs"]["imgs"], data["data_samples"])
        frames += [frame_of(imgs, sample.metainfo) for imgs, sample in pairs]
    if not frames:
        raise MdpError("the importance data set has no frames")
    return frames[:count]


def file_digest(path: Path) -> str:
    """First 16 hex digits of a file's SHA-256."""
    return file_sha256(path)[:16]
