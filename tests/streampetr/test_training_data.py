"""The training loader on the easy miniature data set."""

from __future__ import annotations

from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from mmengine.runner import Runner

import projects.streampetr  # noqa: F401
from mdp_mmdet3d.errors import MdpError


@pytest.fixture
def loader(mini_config):
    return Runner.build_dataloader(mini_config.train_dataloader, seed=0)


def test_batches_are_streams_with_2d_ground_truth(loader) -> None:
    batches = list(islice(loader, 8))
    for column in range(2):
        samples = [batch["data_samples"][column] for batch in batches]
        assert [sample.prev_exists for sample in samples] == [False, True, True, True] * 2
        for before, after in pairwise(samples):
            later = before.scene_token == after.scene_token and after.timestamp > before.timestamp
            assert later == after.prev_exists
    objects = [sample.gt_instances for batch in batches for sample in batch["data_samples"]]
    assert sum(len(own) for own in objects) > 10
    for own in objects:
        assert set(own.keys()) == {"bboxes", "labels", "centers_2d", "depths", "camera"}
        assert own.bboxes.dtype == torch.float32 and own.labels.dtype == torch.int64
        assert ((own.bboxes >= 0) & (own.bboxes <= torch.tensor([176.0, 64, 176, 64]))).all()


def test_2d_centres_are_the_projections_of_3d_boxes(loader) -> None:
    """Files, augmentation and packing agree: most projected 3D centres have a 2D centre next to them."""
    distances = []
    for batch in islice(loader, 4):
        for sample in batch["data_samples"]:
            centres = sample.gt_instances_3d.bboxes_3d.gravity_center.numpy()
            points = np.pad(centres, ((0, 0), (0, 1)), constant_values=1)
            for camera in range(6):
                own = sample.gt_instances.centers_2d[sample.gt_instances.camera == camera].numpy()
                pixels = points @ sample.lidar2img[camera].T
                front = pixels[:, 2] > 1
                pixels = pixels[front, :2] / pixels[front, 2:3]
                inside = ((pixels >= 1) & (pixels <= (175, 63))).all(axis=1)
                for pixel in pixels[inside] if len(own) else ():
                    distances.append(np.linalg.norm(own - pixel, axis=1).min())
    assert len(distances) > 10
    assert np.median(distances) < 1.0


def test_half_scenes_start_streams(mini_config) -> None:
    mini_config.train_dataloader.dataset.scene_parts = 2
    loader = Runner.build_dataloader(mini_config.train_dataloader, seed=0)
    dataset = loader.dataset
    assert [len(sequence) for sequence in dataset.sequences] == [2] * 4
    assert [dataset.get_data_info(i)["prev_exists"] for i in range(8)] == [False, True] * 4
    mini_config.train_dataloader.dataset.scene_parts = 0
    with pytest.raises(MdpError, match="scene_parts=0"):
        Runner.build_dataloader(mini_config.train_dataloader, seed=0)
