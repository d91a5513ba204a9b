"""Sliding-window training: clips and their losses."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mdp_mmdet3d.errors import MdpError
from projects.streampetr.sliding_window import SlidingWindowDataset

from ..numerics import assert_close, assert_decided

ROOT = Path(__file__).resolve().parents[2]


class Frames:
    """Stands for a data set of single frames: scenes of 4."""

    def __init__(self, make_sample, make_images) -> None:
        self.make_sample, self.make_images = make_sample, make_images

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict:
        sample = self.make_sample(i, scene_token=f"scene-{i // 4}")
        return {"inputs": {"img": self.make_images(i)[0]}, "data_samples": sample}


@pytest.fixture
def frames(make_sample, make_images) -> Frames:
    return Frames(make_sample, make_images)


def test_clips_are_ordered_and_drop_at_random(frames) -> None:
    random.seed(0)
    clips = [SlidingWindowDataset(frames, 4, 2, 1).frame_indices(9) for _ in range(50)]
    assert all(clip == sorted(clip) and clip[-1] == 9 and len(set(clip)) == 4 for clip in clips)
    assert all(clip[0] >= 4 for clip in clips)
    assert len({tuple(clip) for clip in clips}) > 5
    assert SlidingWindowDataset(frames, 4, 0, 1).frame_indices(9) == [6, 7, 8, 9]
    assert SlidingWindowDataset(frames, 4, 0, 1).frame_indices(1) == [0, 0, 0, 1]


def test_streams_restart_inside_a_clip_where_the_scene_changes(frames) -> None:
    item = SlidingWindowDataset(frames, 4, 0, 2)[9]
    assert item["inputs"]["img"].shape[0] == 4 * 6
    window = item["data_samples"].metainfo["window"]
    assert [sample.prev_exists for sample in window] == [False, True, False, True]
    assert item["data_samples"].sample_idx == 9


@pytest.mark.numerics
def test_clip_losses_are_those_of_its_last_frames(build_small, frames) -> None:
    model = build_small().train()
    model.denoising = None
    logits = []
    model.pts_bbox_head.cls_branches[0].register_forward_hook(lambda *a: logits.append(a[2][-1].detach()))
    item = SlidingWindowDataset(frames, 4, 0, 2)[3]
    losses = model({"imgs": item["inputs"]["img"][None]}, [item["data_samples"]], mode="loss")
    assert {key.split("_")[1] for key in losses} == {"2", "3"}
    assert model.training and model.memory is None
    # The same frames as a stream.
    expected = {}
    for t in range(4):
        frame = frames[t]
        found = model({"imgs": frame["inputs"]["img"][None]}, [frame["data_samples"]], mode="loss")
        expected |= {f"frame_{t}_{key}": value for key, value in found.items()}
    for key, value in losses.items():
        assert_close(value, expected[key], what=key)
    # The first frames of the clip had no gradients, and rounded differently.
    for clip, single in zip(logits[:4], logits[4:]):
        assert_decided(clip, single, [16], aligned=60)


def test_gradients_come_from_the_last_frames_only(build_small, frames) -> None:
    model = build_small().train()
    grids = []
    model.img_backbone.register_forward_hook(lambda *_: grids.append(torch.is_grad_enabled()))
    item = SlidingWindowDataset(frames, 4, 1, 2)[9]
    losses = model({"imgs": item["inputs"]["img"][None]}, [item["data_samples"]], mode="loss")
    assert grids == [False, False, True, True]
    sum(losses.values()).backward()
    assert model.img_backbone.conv1.weight.grad.isfinite().all()


def test_impossible_counts_are_refused(frames) -> None:
    with pytest.raises(MdpError, match="num_frames=2, num_dropped=1, grad_frames=3"):
        SlidingWindowDataset(frames, 2, 1, 3)


def test_published_config_makes_clips(easy_root, mini_config) -> None:
    config = Config.fromfile(ROOT / "configs/streampetr/streampetr_r50_704x256_900q_8key_24e.py")
    assert config.train_dataloader.dataset.type == "SlidingWindowDataset"
    assert config.optim_wrapper.optimizer.lr == 2e-4
    loader = mini_config.train_dataloader
    loader.dataset = dict(config.train_dataloader.dataset, dataset=loader.dataset)
    loader.sampler, loader.batch_sampler = config.train_dataloader.sampler, None
    mini_config.train_cfg.max_iters = 1
    runner = Runner.from_cfg(mini_config)
    runner.train()
    assert {"train/frame_6_loss_cls", "train/frame_7_enc_loss_iou"} <= set(runner.message_hub.log_scalars)
