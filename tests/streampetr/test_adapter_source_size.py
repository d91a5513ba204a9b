from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from mmengine import Config

from mdp_mmdet3d.adapters import InputShape
from mdp_mmdet3d.errors import MdpError
from projects.streampetr.adapter import NUSCENES_IMAGE, StreamPETRAdapter


class Loader:
    def __init__(self, dataset):
        self.dataset = dataset


def test_the_host_image_is_the_data_sets(monkeypatch):
    sample = SimpleNamespace(metainfo={"ori_shape": (64, 176, 3)})
    adapter = StreamPETRAdapter(Config(), InputShape(6, 64, 176))
    monkeypatch.setattr(adapter, "importance_loader", lambda: Loader([{"data_samples": sample}]))
    assert adapter.source_size == (64, 176)
    other = StreamPETRAdapter(Config(), InputShape(6, 64, 176))

    def missing():
        raise MdpError("no data")

    monkeypatch.setattr(other, "importance_loader", missing)
    assert other.source_size == NUSCENES_IMAGE


def test_an_image_that_the_pyramid_cannot_take_is_refused_before_any_work():
    adapter = StreamPETRAdapter(Config(), InputShape(6, 64, 170))
    with pytest.raises(MdpError, match=r"input_size = \(64, 170\).*multiples of 16"):
        adapter.add_to_space(None, None)


def test_images_of_another_size_than_the_deployed_one_are_named(monkeypatch):
    adapter = StreamPETRAdapter(Config(), InputShape(6, 64, 176))
    monkeypatch.setattr(adapter, "importance_batches", lambda: iter([{}]))
    monkeypatch.setattr("projects.streampetr.frames.frame_of", lambda imgs, _: SimpleNamespace(img=imgs))
    batch = {"inputs": {"imgs": [np.zeros((6, 3, 32, 88))]}, "data_samples": [SimpleNamespace(metainfo={})]}
    model = SimpleNamespace(data_preprocessor=lambda *_: batch)
    with pytest.raises(MdpError, match=r"images of \(32, 88\) pixels .*, prune.input_size is \(64, 176\): set prune"):
        adapter.frames(model, 1)
