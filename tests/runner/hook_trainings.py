"""Deterministic trainings with importance and pruning hooks, for the tests of these hooks."""

from __future__ import annotations

import importlib
import pickle
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.runner import Runner

import mdp_mmdet3d.runner  # noqa: F401
import projects.streampetr  # noqa: F401
from mdp_mmdet3d.importance.table import ImportanceTable

from ..numerics import EPS, NETWORK

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))  # for runner_frames, which configs import by name
importlib.import_module("runner_frames")
PRUNE = dict(budget=0.6, input_size=(64, 192), max_options=4, channel_multiple=8, repair=False)


@pytest.fixture
def make_config(tiny_config, tiny_frames, tmp_path):
    """Function that makes a config of a deterministic training: no dropout, no denoising, learning rate ``lr``."""

    path = tmp_path / "frames.pkl"
    items = [dict(inputs=dict(img=b["inputs"]["img"][0]), data_samples=b["data_samples"][0]) for b in tiny_frames(4)]
    path.write_bytes(pickle.dumps(items))
    runs = count()

    def make(work_dir: Path, hooks: list[dict], iterations: int, lr: float = 0.0, **optim) -> Config:
        model = tiny_config()
        model.denoising = None
        model.pts_bbox_head.decoder.update(dropout=0.0, self_attn_drop=0.0)
        return Config(dict(
            default_scope="mmdet3d", model=model, work_dir=str(work_dir), log_level="ERROR",
            experiment_name=f"{work_dir.name}-{next(runs)}",
            custom_imports=dict(imports=["projects.streampetr", "runner_frames"], allow_failed_imports=False),
            train_dataloader=dict(batch_size=1, num_workers=0, sampler=dict(type="InfiniteSampler", shuffle=False),
                                  dataset=dict(type="RecordedFrames", path=str(path))),
            train_cfg=dict(type="IterBasedTrainLoop", max_iters=iterations),
            optim_wrapper=dict(type="FiniteOptimWrapper",
                               optimizer=dict(type="AdamW", lr=lr, weight_decay=0.01), **optim),
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2),
                               logger=dict(type="LoggerHook", interval=100)),
            custom_hooks=hooks, prune=PRUNE, randomness=dict(seed=0)))  # fmt: skip

    return make


def table_of(runner: Runner, name: str = "importance.npz") -> ImportanceTable:
    return ImportanceTable.load(Path(runner.work_dir) / name)


def assert_same(found: ImportanceTable, expected: ImportanceTable, rtol: float = 1e-4) -> None:
    """Equal scores; what is a small rest of large terms is equal up to rounding of the largest score."""
    assert (found.batches, found.skipped) == (expected.batches, expected.skipped)
    for name, blocks in expected.scores.items():
        for block, array in blocks.items():
            np.testing.assert_allclose(found.scores[name][block], array, rtol=rtol, atol=NETWORK * EPS * array.max())


def train(config: Config) -> Runner:
    runner = Runner.from_cfg(config)
    runner.train()
    return runner
