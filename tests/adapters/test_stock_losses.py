"""Losses of configs as MMPretrain and MMDetection ship them, on a batch as importance takes it."""

from __future__ import annotations

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData

from mdp_mmdet3d.adapters import InputShape, adapter_of
from mdp_mmdet3d.errors import MdpError

SMALL_VIT = dict(embed_dims=32, num_layers=1, num_heads=2, feedforward_channels=32)
SMALL_SWIN = dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1])
SMALL_CONVNEXT = dict(depths=[1, 1, 1, 1], channels=[8, 8, 8, 8])


def stock(name, tmp_path, **changes):
    """The adapter and model of a stock config."""
    path = tmp_path / "stock.py"
    path.write_text(f'_base_ = ["{name}"]\n')
    config = Config.fromfile(path)
    config.merge_from_dict(changes)
    adapter = adapter_of(config, InputShape(0, 64, 64))
    return adapter, adapter.build(None)[0]


def image(height, width):
    return torch.randint(0, 255, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name,arch,width",
    [
        ("mmpretrain::vision_transformer/vit-base-p32_64xb64_in1k.py", SMALL_VIT, 32),  # mixup on a plain entropy
        ("mmpretrain::deit/deit-tiny_4xb256_in1k.py", SMALL_VIT, 32),  # mixup, CutMix, smoothed labels
        ("mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py", SMALL_SWIN, 128),
        ("mmpretrain::convnext/convnext-tiny_32xb128_in1k.py", SMALL_CONVNEXT, 8),
    ],
)
def test_a_training_that_mixes_images_has_a_loss_on_images_that_are_not_mixed(name, arch, width, tmp_path):
    samples = pytest.importorskip("mmpretrain.structures")
    changes = {"model.backbone.arch": dict(arch, _delete_=True), "model.head.in_channels": width}
    adapter, model = stock(name, tmp_path, **changes)
    if hasattr(model.head.layers if hasattr(model.head, "layers") else model.head, "head"):
        torch.nn.init.normal_(model.head.layers.head.weight)  # 0 as shipped: the loss would not depend on the image
    batch = dict(inputs=torch.stack([image(224, 224)] * 2), data_samples=[samples.DataSample() for _ in range(2)])
    for label, sample in enumerate(batch["data_samples"]):
        sample.set_gt_label(label)
    loss = adapter.losses(model, batch)
    with torch.no_grad():
        scores = model(model.data_preprocessor(dict(batch), False)["inputs"], mode="tensor")
        scores = model.head((scores[-1],)) if isinstance(scores, tuple) else scores
    smoothing = getattr(model.head.loss_module, "_eps", 0.0)
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1]), label_smoothing=smoothing)
    )
    loss.backward()
    assert any(
        parameter.grad.abs().max() > 0 for parameter in model.backbone.parameters() if parameter.grad is not None
    )


def test_images_that_do_not_fit_the_strides_name_the_module_and_the_padding(tmp_path):
    name = "mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py"
    adapter, model = stock(name, tmp_path)
    sample = DetDataSample(metainfo=dict(img_shape=(72, 64), ori_shape=(72, 64), scale_factor=(1.0, 1.0)))
    sample.gt_instances = InstanceData(bboxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([3]))
    batch = dict(inputs=[image(72, 64)], data_samples=[sample])
    with pytest.raises(MdpError, match=r"images of 72 x 64\): RuntimeError in 'neck'.*pad_size_divisor=32"):
        adapter.losses(model, batch)
    adapter, model = stock(name, tmp_path, **{"model.data_preprocessor.pad_size_divisor": 32})
    assert torch.isfinite(adapter.losses(model, batch))


def test_data_without_what_the_loss_wants_is_named(tmp_path):
    adapter, model = stock("mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py", tmp_path)
    batch = dict(inputs=[image(64, 64)], data_samples=[DetDataSample(metainfo=dict(img_shape=(64, 64)))])
    with pytest.raises(MdpError, match=r"RTMDet cannot be computed .*64 x 64.*annotations"):
        adapter.losses(model, batch)
