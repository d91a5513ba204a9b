"""Models that nobody here wrote an adapter for: space, verification and the whole line to a measured latency."""

from __future__ import annotations

import copy
from dataclasses import replace

import mmpretrain.models  # noqa: F401
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.models.backbones.resnet import BasicBlock
from PIL import Image
from rich.console import Console
from torch import nn

from mdp_mmdet3d.adapters import InputShape, SingleGraph, adapter_of, trace_space
from mdp_mmdet3d.adapters.single_graph_export import TensorMode
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.runner.job import PruneJob
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.space.builder import SpaceOptions
from mdp_mmdet3d.space.types import BlockKind
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan
from mdp_mmdet3d.surgery.verify import verify_space

SIZE = (64, 64)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """MMPretrain's ResNet-18, thin, with a folder of images in its own format."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (80, 96, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return Config(
        dict(
            default_scope="mmpretrain",
            model=dict(
                type="ImageClassifier",
                data_preprocessor=dict(num_classes=2, mean=[127.0] * 3, std=[60.0] * 3, to_rgb=True),
                backbone=dict(type="ResNet", depth=18, base_channels=16, stem_channels=16, zero_init_residual=False),
                neck=dict(type="GlobalAveragePooling"),
                head=dict(type="LinearClsHead", num_classes=2, in_channels=128, loss=dict(type="CrossEntropyLoss")),
            ),
            train_dataloader=dict(
                batch_size=2,
                num_workers=0,
                sampler=dict(type="DefaultSampler", shuffle=False),
                dataset=dict(
                    type="CustomDataset",
                    data_root=str(root),
                    pipeline=[
                        dict(type="LoadImageFromFile"),
                        dict(type="Resize", scale=SIZE),
                        dict(type="PackInputs"),
                    ],
                ),
            ),
            prune=dict(
                budget=0.6, frames=3, input_size=SIZE, max_options=4, channel_multiple=8, rounds=4, refinements=1,
                fit_networks=2,
            ),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def traced(config):
    adapter = adapter_of(config, InputShape(0, *SIZE))
    model, _ = adapter.build(None)
    for module in model.modules():  # statistics that are not 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            nn.init.normal_(module.bias, 0, 0.1)
    return adapter, model, adapter.trace(model, SpaceOptions(4, 8, 8, 0.0, ()))


def outputs(model, image):
    with torch.no_grad():
        return TensorMode(model.eval(), SIZE)(image)[0]


def test_a_preprocessor_beside_the_model_is_the_models(config):
    """MMPretrain's configs have it there, and MMEngine's Runner puts it in: what is not normalised is no such image."""
    beside = copy.deepcopy(config)
    beside.data_preprocessor = beside.model.pop("data_preprocessor")
    found = adapter_of(beside, InputShape(1, *SIZE)).build(None)[0].data_preprocessor
    assert found.mean.flatten().tolist() == [127.0] * 3 and found.std.flatten().tolist() == [60.0] * 3 and found.to_rgb
    beside.model.data_preprocessor = dict(mean=[1.0] * 3, std=[2.0] * 3)
    assert adapter_of(beside, InputShape(1, *SIZE)).build(None)[0].data_preprocessor.std.flatten().tolist() == [2.0] * 3


def test_blocks_are_found_by_what_they_do(traced):
    adapter, _, space = traced
    assert type(adapter) is SingleGraph
    kinds = {block.name: block.kind for block in space.blocks}
    assert len(kinds) == 8
    assert kinds["backbone.layer1.0"] is BlockKind.IDENTITY
    assert kinds["backbone.layer2.0"] is BlockKind.RESIDUAL_BRANCH
    assert {block.last for block in space.blocks} == {"bn2"}
    # The last stage's stream enters the classifier, whose columns go with it.
    assert any(m.tensor == "head.fc.weight" for d in space.dimensions for m in d.members)
    used = {name for term in space.terms for name in term.dimensions}
    assert used == {dimension.name for dimension in space.dimensions}


@pytest.mark.parametrize("seed", range(3))
def test_random_plans_equal_the_masked_model(traced, random_kept, seed):
    _, model, space = traced
    plan = PruningPlan.from_kept(space, *random_kept(space, np.random.default_rng(seed), 0.3))
    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
    pruned = outputs(apply_plan(copy.deepcopy(model), plan), image)
    masked = outputs(mask_model(copy.deepcopy(model), plan), image)
    torch.testing.assert_close(pruned, masked, rtol=1e-4, atol=1e-4 * float(masked.abs().max()))


def test_what_verification_finds_wrong_is_left_alone_with_the_reason(traced, monkeypatch):
    adapter, model, space = traced
    broken = next(d for d in space.dimensions if d.name.endswith("layer1.0.conv1.out"))
    members = tuple(m for m in broken.members if ".bn1." not in m.tensor)
    dimensions = tuple(replace(d, members=members) if d is broken else d for d in space.dimensions)
    wrong = replace(space, dimensions=dimensions)
    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    failures = verify_space(wrong, model, lambda m: TensorMode(m, SIZE)(image))
    assert list(failures) == [broken.name]
    assert failures[broken.name].startswith("verification failed: ")
    monkeypatch.setattr(
        "mdp_mmdet3d.adapters.single_graph.verify_space", lambda *_: {broken.name: "verification failed: it differs"}
    )
    again = adapter_of(adapter.config, adapter.shape).trace(model, SpaceOptions(4, 8, 8, 0.0, ()))
    assert broken.name not in again.by_name
    assert {n.module: n.reason for n in again.not_prunable}[broken.name] == "verification failed: it differs"


class Blind(nn.Module):
    """Sees its image only through a block: without it, or with weights of 0, the outputs are a constant."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.block = BasicBlock(32, 32)
        self.head = nn.Conv2d(32, 4, 1)
        self.scale = scale

    def forward(self, inputs, data_samples=None, mode="tensor"):
        x = self.stem(inputs).relu()
        return self.head(self.scale * (self.block(x) - x))


def test_a_network_whose_outputs_are_the_same_whatever_it_sees_is_refused():
    adapter = SingleGraph(Config(), InputShape(1, *SIZE))
    with pytest.raises(MdpError, match=r"Blind: the model gives the same outputs for two different inputs"):
        adapter.trace(Blind(0).eval(), SpaceOptions(4, 8, 8, 0.0, ()))


def test_a_smallest_network_that_does_not_see_its_image_is_named_with_the_remedy(tmp_path):
    adapter = SingleGraph(Config(), InputShape(1, *SIZE))
    space = adapter.trace(Blind().eval(), SpaceOptions(4, 8, 8, 0.0, ()))
    assert [block.name for block in space.blocks] == ["block"]
    pruned = apply_plan(Blind().eval(), PruningPlan.from_kept(space, {}, {"block"}))
    with pytest.raises(MdpError, match=r"the outputs are the same for 2 different frames|prune\.freeze"):
        adapter.export(pruned, tmp_path / "x", plan_hash=None, weights="w")
        adapter.compare(pruned, tmp_path / "x", [np.full((1, 3, *SIZE), v, np.float32) for v in (0.1, 0.2)])


def test_an_exported_network_that_is_a_constant_is_refused(tmp_path):
    adapter = SingleGraph(Config(), InputShape(1, *SIZE))
    model = Blind().eval()
    nn.init.zeros_(model.head.weight)
    adapter.export(model, tmp_path / "x", plan_hash=None, weights="w")
    frames = [np.full((1, 3, *SIZE), value, np.float32) for value in (0.1, 0.2)]
    with pytest.raises(MdpError, match=r"x: the outputs are the same for 2 different frames"):
        adapter.compare(model, tmp_path / "x", frames)
    assert adapter.compare(model, tmp_path / "x", frames[:1] * 2)["outputs"] == 0


class Halving(BasicBlock):
    """Looks like a residual block, and without its branch returns half of its input."""

    def forward(self, x):
        return 0.5 * super().forward(x)


def test_a_block_that_does_something_else_is_not_one(config):
    init_default_scope("mmpretrain")
    model = MODELS.build(config.model).eval()
    model.backbone.layer1[1].__class__ = Halving
    space = trace_space(model, InputShape(1, *SIZE), SpaceOptions(4, 8, 8, 0.0, ()))
    assert "backbone.layer1.1" not in space.blocks_by_name and "backbone.layer1.0" in space.blocks_by_name


@pytest.mark.slow
def test_the_whole_line(config, tmp_path):
    settings = PruneSettings.from_config(config.prune)
    report = PruneJob(config, settings, tmp_path / "w", None, Console(quiet=True)).run()
    assert report["model"] == "ImageClassifier" and report["solver"]["status"] == "optimal"
    assert report["pruned"]["macs"] < report["dense"]["macs"]
    assert set(report["pruned"]["engines_ms"]) == {"model"}
    assert max(d["outputs"] for d in report["differences"].values()) < 1e-4
    pruned = Config.fromfile(tmp_path / "w" / "pruned_config.py")
    assert tuple(pruned.prune.input_size) == SIZE  # what tools/export.py needs
    init_default_scope("mmpretrain")
    model = MODELS.build(pruned.model)
    adapter = adapter_of(pruned, settings.input_shape)
    adapter.load(model, str(tmp_path / "w" / "pruned.pth"))
    frames = adapter_of(config, settings.input_shape).frames(model, 2)
    assert adapter.compare(model, tmp_path / "w" / "onnx" / "pruned", frames)["outputs"] < 1e-4


def test_data_that_cannot_be_opened_is_named(config):
    broken = copy.deepcopy(config)
    broken.train_dataloader.dataset.type = "ImageNet"
    with pytest.raises(
        MdpError, match=r"data set of the importance data \(ImageNet\) cannot be opened: AssertionError"
    ):
        next(adapter_of(broken, InputShape(0, *SIZE)).importance_batches())
    broken.pop("train_dataloader")
    with pytest.raises(MdpError, match="no importance_dataloader and no train_dataloader"):
        next(adapter_of(broken, InputShape(0, *SIZE)).importance_batches())
