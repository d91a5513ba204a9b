from __future__ import annotations

from types import SimpleNamespace

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
