"""How long and at which rate a pruned model is fine-tuned where the config says ``finetune="auto"``."""

from __future__ import annotations

import copy
import math

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.registry import DATASETS

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.runner.recovery import check_trainable
from mdp_mmdet3d.runner.settings import AUTO, FinetuneSettings, PruneSettings

PASSES = 14.0
"""Times through the training data per share of the latency that was cut: 4.2 at a share of 0.7 (docs/method.md)."""
RATE = 0.4
"""Of the learning rate of training."""
STEP = 0.05
"""Shares are rounded to it, so that another prediction of the same budget does not train anew."""
SAVES = 20


def finetuning_of(config: Config, settings: PruneSettings, share: float) -> FinetuneSettings | None:
    """How to fine-tune a pruned model: as ``prune.finetune`` says; None: not at all.

    Args:
        config: The dense config.
        settings: Its ``prune`` section.
        share: Of the dense latency that the plan keeps.

    Raises:
        MdpError: ``"auto"`` needs training data and a learning rate, and the config has none.
    """
    if settings.finetune != AUTO:
        return settings.finetuning
    check_trainable(config)
    rate = config.optim_wrapper.get("optimizer", {}).get("lr")
    if rate is None:
        raise MdpError(
            "prune.finetune='auto' takes a share of optim_wrapper.optimizer.lr, which the config does not have; set "
            "it, or give prune.finetune=dict(iterations=..., lr=...)"
        )
    loader = config.train_dataloader
    frames = len(DATASETS.build(copy.deepcopy(loader.dataset)))
    passes = PASSES * (1 - min(round(share / STEP) * STEP, 1 - STEP))
    iterations = max(1, math.ceil(round(passes * frames / (loader.batch_size * get_world_size()), 6)))
    return FinetuneSettings(iterations, lr=rate * RATE, save_interval=max(1, iterations // SAVES))
