"""Checkpoints of torchvision and timm load into MMPretrain's models and compute what they computed there."""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope, init_default_scope

from mdp_mmdet3d.checkpoint.load import load_checkpoint
from mdp_mmdet3d.checkpoint.public_names import to_mmpretrain
from mdp_mmdet3d.errors import StructureMismatchError

pytest.importorskip("mmpretrain")


@pytest.fixture(scope="module", autouse=True)
def default_scope():
    """Leave the scope that MMEngine builds in as it was: it is the process's."""
    before = DefaultScope.get_current_instance()
    yield
    init_default_scope(before.scope_name if before else "mmdet3d")


def resnet(depth=50):
    head = dict(type="LinearClsHead", num_classes=1000, in_channels=2048 if depth > 34 else 512)
    neck = dict(type="GlobalAveragePooling")
    return dict(type="ImageClassifier", backbone=dict(type="ResNet", depth=depth), neck=neck, head=head)


def vit(arch, width):
    head = dict(type="VisionTransformerClsHead", num_classes=1000, in_channels=width)
    backbone = dict(type="VisionTransformer", arch=arch, img_size=224, patch_size=16)
    return dict(type="ImageClassifier", backbone=backbone, head=head)


VGG16 = dict(type="ImageClassifier", backbone=dict(type="VGG", depth=16, num_classes=1000), head=dict(type="ClsHead"))


def build(config):
    init_default_scope("mmpretrain")
    return MODELS.build(config).eval()


def public(name):
    """The public network: torchvision's ResNet and VGG, timm's DeiT, with random weights."""
    if name.startswith("deit"):
        return pytest.importorskip("timm").create_model(name).eval()
    return pytest.importorskip("torchvision").models.get_model(name).eval()


@pytest.mark.parametrize(
    "name,config", [("resnet50", resnet()), ("vgg16", VGG16), ("deit_base_patch16_224", vit("deit-base", 768))]
)
def test_every_tensor_of_the_public_network_gets_a_name_of_the_same_shape(name, config):
    theirs, ours = public(name).state_dict(), build(config).state_dict()
    state, recognised = to_mmpretrain(theirs, ours)
    assert recognised
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in ours.items()}


@pytest.mark.parametrize(
    "name,config,pixels",
    [("resnet18", resnet(18), 64), ("deit_tiny_patch16_224", vit("deit-tiny", 192), 224)],
)
def test_a_loaded_file_computes_what_the_public_network_computes(name, config, pixels, tmp_path):
    torch.manual_seed(0)
    theirs, ours = public(name), build(config)
    for parameter in theirs.parameters():  # public initialisers leave biases at 0
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    # As data parallel training saves it, and without the counters that old files lack.
    state = {f"module.{k}": v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({"model": state}, tmp_path / "public.pth")
    load_checkpoint(ours, tmp_path / "public.pth")
    image = torch.randn(2, 3, pixels, pixels)
    with torch.no_grad():
        expected, found = theirs(image), ours.head(ours.extract_feat(image))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_another_depth_is_refused_and_names_of_the_model_stay(tmp_path):
    ours = build(resnet(18))
    torch.save(public("resnet34").state_dict(), tmp_path / "other.pth")
    with pytest.raises(StructureMismatchError, match=r"other.pth is of another model.*backbone.layer1.2"):
        load_checkpoint(ours, tmp_path / "other.pth")
    own = ours.state_dict()
    assert to_mmpretrain(own, own) == (own, "")
    unknown = {"stem.weight": torch.zeros(1)}
    assert to_mmpretrain(unknown, own) == (unknown, "")
