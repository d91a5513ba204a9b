"""Which adapter a model gets, and what is said of one that is wrong."""

from __future__ import annotations

import pytest
from mmengine.config import Config
from mmengine.registry import TASK_UTILS

import projects.streampetr  # noqa: F401  registers its adapter
from mdp_mmdet3d.adapters import Adapter, InputShape, SingleGraph, adapter_of, register_adapter
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.runner.settings import PruneSettings

SHAPE = InputShape(0, 64, 96)


class Partial(SingleGraph):
    """Overrides what it needs."""

    models = ("NoModelOfThisName",)

    def __init__(self, config, shape, stride=1):
        super().__init__(config, shape)
        self.stride = stride


@pytest.fixture
def partial():
    register_adapter(Partial)
    yield
    TASK_UTILS.module_dict.pop("Partial")


def test_streampetr_has_its_own_and_any_other_model_the_single_graph():
    config = Config.fromfile("configs/_base_/models/streampetr_r50_704x256_428q.py")
    found = adapter_of(config, SHAPE)
    assert type(found).__name__ == "StreamPETRAdapter"
    assert found.shape == InputShape(6, 64, 96)
    pruned = Config(dict(model=dict(type="MDPPrunedModel", architecture=config.model, plan="plan.json")))
    assert type(adapter_of(pruned, SHAPE)) is type(found)
    other = adapter_of(Config(dict(model=dict(type="mmdet.RetinaNet"))), SHAPE)
    assert type(other) is SingleGraph and other.shape.num_cams == 1


def test_a_config_names_an_adapter_with_arguments(partial):
    config = Config(dict(model=dict(type="mmdet.RetinaNet")))
    assert adapter_of(config, SHAPE, dict(type="Partial", stride=4)).stride == 4
    with pytest.raises(MdpError, match=r"'Partia' is not registered; known: .*Partial.*custom_imports"):
        adapter_of(config, SHAPE, dict(type="Partia"))
    with pytest.raises(MdpError, match=r"prune\.adapter: .*strid"):
        adapter_of(config, SHAPE, dict(type="Partial", strid=4))
    with pytest.raises(MdpError, match=r"prune\.adapter = \{'stride': 4\} must be a dict with a type"):
        PruneSettings.from_config(dict(adapter=dict(stride=4)))


def test_an_adapter_with_batches_of_its_own_is_repaired_with_them():
    class Own(SingleGraph):
        def importance_batches(self):
            return iter(["first", "second"])

    adapter = Own(Config(dict(model=dict(type="mmdet.RetinaNet"))), SHAPE)
    assert next(adapter.calibration_batches(1)) == "first"


def test_an_adapter_that_leaves_out_a_method_is_refused_when_it_is_registered():
    class Incomplete(Adapter):
        def frames(self, model, count):
            return []

    with pytest.raises(
        MdpError, match=r"Incomplete leaves out add_to_space, compare, deploy, export.*new-architecture"
    ):
        register_adapter(Incomplete)
    assert "Incomplete" not in TASK_UTILS.module_dict


def test_a_model_that_is_not_registered_is_named():
    with pytest.raises(MdpError, match=r"model type 'Nothing' is not registered.*custom_imports"):
        adapter_of(Config(dict(model=dict(type="Nothing"))), SHAPE)
