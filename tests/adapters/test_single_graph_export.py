from __future__ import annotations

import copy
import runpy
import sys
from pathlib import Path

import mmdet3d
import numpy as np
import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mdp_mmdet3d.adapters.single_graph_export import compare, export_single_graph
from mdp_mmdet3d.errors import DeploymentError, FileFormatError
from mdp_mmdet3d.runtime.graph_manifest import GraphManifest, load_manifest
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.runtime.ort_engine import OrtEngine
from mdp_mmdet3d.space.types import DimensionKind, TensorAxis
from mdp_mmdet3d.surgery.apply import model_digest
from mdp_mmdet3d.surgery.plan import Cut, PruningPlan

TOOL = Path(__file__).resolve().parents[2] / "tools/export.py"
BASES = Path(mmdet3d.__file__).parent / ".mim/configs/_base_/models"
SIZE = (128, 192)  # FCOS3D has a level of stride 128
BACKBONE = {"depth": 18, "base_channels": 16, "init_cfg": None, "frozen_stages": -1, "style": "pytorch"}


def fcos3d(dcn: bool = False) -> dict:
    """MMDetection3D's own FCOS3D, tiny."""
    config = Config.fromfile(BASES / "fcos3d.py").model
    config.backbone.update(BACKBONE)
    config.neck.update(in_channels=[16, 32, 64, 128], out_channels=32)
    branches = {"cls_branch": (32,), "dir_branch": (32,), "attr_branch": (32,)}
    reg_branch = ((32,), (32,), (32,), (32,), ())
    config.bbox_head.update(in_channels=32, feat_channels=32, dcn_on_last_conv=dcn, reg_branch=reg_branch, **branches)
    return config.to_dict()


def retinanet() -> dict:
    """MMDetection's RetinaNet, tiny."""
    return {
        "type": "mmdet.RetinaNet",
        "data_preprocessor": {"type": "mmdet.DetDataPreprocessor", "mean": [123.675, 116.28, 103.53],
                              "std": [58.395, 57.12, 57.375], "bgr_to_rgb": True},
        "backbone": {"type": "mmdet.ResNet", "depth": 18, "base_channels": 8, "norm_cfg": {"type": "BN"}},
        "neck": {"type": "mmdet.FPN", "in_channels": [8, 16, 32, 64], "out_channels": 16, "start_level": 1,
                 "num_outs": 3},
        "bbox_head": {"type": "mmdet.RetinaHead", "num_classes": 4, "in_channels": 16, "feat_channels": 16,
                      "stacked_convs": 2,
                      "anchor_generator": {"type": "mmdet.AnchorGenerator", "octave_base_scale": 4,
                                           "scales_per_octave": 1, "ratios": [1.0], "strides": [8, 16, 32]},
                      "bbox_coder": {"type": "mmdet.DeltaXYWHBBoxCoder"},
                      "loss_cls": {"type": "mmdet.FocalLoss"}, "loss_bbox": {"type": "mmdet.L1Loss"}},
    }  # fmt: skip


def build(config: dict) -> nn.Module:
    init_default_scope("mmdet3d")
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(config))
    for module in model.modules():  # statistics that folding must not lose
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model.eval()


def a_plan(model: nn.Module) -> PruningPlan:
    """Cuts the inner channels of one block."""
    block = "backbone.layer3.0"
    members = (
        TensorAxis(f"{block}.conv1.weight", 0),
        *(TensorAxis(f"{block}.bn1.{leaf}", 0) for leaf in ("weight", "bias", "running_mean", "running_var")),
        TensorAxis(f"{block}.conv2.weight", 1),
    )
    size = model.get_submodule(f"{block}.conv1").out_channels
    kept = (tuple(range(0, size, 2)),)
    return PruningPlan(
        model_digest(model), {f"{block}.conv1.out": Cut(DimensionKind.CHANNELS, size, kept, members)}, {}
    )


def flat(outputs) -> list[np.ndarray]:
    if isinstance(outputs, torch.Tensor):
        return [outputs.detach().numpy()]
    return [array for item in outputs for array in flat(item)]


@pytest.fixture(params=[fcos3d, retinanet], ids=["fcos3d", "retinanet"])
def detector(request) -> dict:
    return request.param()


def test_the_graph_gives_what_the_detector_gives(detector, tmp_path):
    model = build(detector)
    manifest = export_single_graph(model, tmp_path / "out", input_size=SIZE, class_names=("a", "b"), weights="w")
    assert load_manifest(tmp_path / "out") == manifest == GraphManifest.load(tmp_path / "out")
    assert manifest.model_type == type(model).__name__ and manifest.channel_order == "RGB"
    assert manifest.mean == (123.675, 116.28, 103.53)
    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(99))
    inputs = {"imgs": image} if "Mono3D" in type(model).__name__ else image
    with torch.no_grad():
        expected = flat(model(inputs, [], mode="tensor"))
    found = OrtEngine(tmp_path / "out" / "model.onnx").run({"img": image.numpy()})
    assert list(found) == [spec.name for spec in manifest.engines["model"].outputs] and len(expected) == len(found) > 5
    for name, values in zip(found, expected):
        # FCOS3D's smallest level normalises groups of two values, which magnifies rounding.
        np.testing.assert_allclose(found[name], values, atol=1e-3 * max(1.0, np.abs(values).max()), rtol=0)
    assert max(manifest.checks["float32_against_pytorch"]["difference"].values()) < 1e-3


def test_a_pruned_model_in_float16(detector, tmp_path):
    import mdp_mmdet3d.runner  # noqa: F401  registers MDPPrunedModel

    plan = a_plan(build(detector))
    pruned = build({"type": "MDPPrunedModel", "architecture": detector, "plan": plan.to_dict()})
    manifest = export_single_graph(pruned, tmp_path / "out", input_size=SIZE, precision="float16", plan_hash=plan.hash)
    dense = export_single_graph(build(detector), tmp_path / "dense", input_size=SIZE)
    assert manifest.plan_hash == plan.hash and manifest.precision == "float16"
    check = manifest.checks["float16_against_pytorch"]
    relative = [difference / max(1.0, check["largest"][name]) for name, difference in check["difference"].items()]
    assert 0 < max(relative) < 0.02
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("out", "dense")]
    assert sizes[0] < 0.6 * sizes[1]
    assert manifest.engines == dense.engines, "inputs and outputs stay float32"


def test_the_tool_exports_any_config(monkeypatch, capsys, tmp_path):
    config = tmp_path / "tiny.py"
    Config({"model": retinanet(), "default_scope": "mmdet3d"}).dump(config)

    def export(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", [str(TOOL), str(config), "--out", str(tmp_path / "out"), *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(TOOL), run_name="__main__")
        return stopped.value.code

    assert export() == 2
    assert "--input-size" in capsys.readouterr().err
    assert export("--input-size", "64", "96", "--no-simplify") == 0
    assert "model.onnx" in capsys.readouterr().out
    assert load_manifest(tmp_path / "out").software["simplify"] == "constants only"
    assert export("--input-size", "64", "96", "--evaluate") == 2
    assert "tools/test.py" in capsys.readouterr().err
    assert export("--input-size", "64", "96", "--precision", "int8") == 2
    assert "int8" in capsys.readouterr().err


def test_the_streaming_runtime_says_that_it_cannot_run_it(detector, tmp_path):
    export_single_graph(build(detector), tmp_path / "out", input_size=SIZE)
    with pytest.raises(FileFormatError, match="StreamPETR only"):
        DeploymentManifest.load(tmp_path / "out")


class Magnifier(nn.Module):
    """A network in which rounding errors grow to a tenth: no two runtimes agree on it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3)
        self.mix = nn.Conv2d(64, 8, 3)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return (self.mix(self.conv(inputs)) * 1e5).sin()


def test_what_a_network_magnifies_is_not_blamed_on_the_export(tmp_path):
    torch.manual_seed(0)
    model = Magnifier().eval()
    check = export_single_graph(model, tmp_path / "out", input_size=SIZE).checks["float32_against_pytorch"]
    assert check["difference"]["output"] > 1e-3 and check["rounding"]["output"] > 1e-3
    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wrong = {"output": model(image).numpy() + 3.0}
    with pytest.raises(
        DeploymentError, match=r"differs from PyTorch by 3\.\d.*rounding explains .*e-0.: do not deploy"
    ):
        compare(tmp_path / "out" / "model.onnx", [image], [wrong], 1e-3, lambda: check["rounding"])


def test_a_truncated_graph_is_noticed(tmp_path):
    export_single_graph(build(retinanet()), tmp_path / "out", input_size=SIZE)
    path = tmp_path / "out" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileFormatError, match=r"model\.onnx.*SHA-256"):
        load_manifest(tmp_path / "out")


def test_point_detectors_are_refused_with_the_module(tmp_path):
    class Pillars(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.voxel_encoder = nn.Linear(4, 4)

    with pytest.raises(DeploymentError, match=r"takes points: voxel_encoder \(Linear\)"):
        export_single_graph(Pillars(), tmp_path / "out", input_size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_a_custom_operator_is_refused(tmp_path):
    """FCOS3D as published has deformable convolutions."""
    with pytest.raises(DeploymentError, match=r"(?s)FCOSMono3D.*(cls_convs|eform)"):
        export_single_graph(build(fcos3d(dcn=True)), tmp_path / "out", input_size=SIZE)
    assert list(tmp_path.iterdir()) == []


class Broken(nn.Module):
    """A detector with one operator that the exporter does not know, two modules deep."""

    class Bad(nn.Module):
        def forward(self, x):
            return torch.special.i0e(x)

    class Raises(nn.Module):
        def forward(self, x):
            raise ValueError("needs lidar2img")

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.neck = nn.ModuleDict({"inner": kind()})

    def forward(self, inputs, samples, mode):
        return self.neck["inner"](inputs)


@pytest.mark.parametrize(("kind", "message"), [
    (Broken.Bad, r"i0e.*used in neck\.inner"), (Broken.Raises, r"ValueError in 'neck\.inner': needs lidar2img"),
])  # fmt: skip
def test_what_cannot_be_traced_is_named(tmp_path, kind, message):
    with pytest.raises(DeploymentError, match=f"(?s){message}"):
        export_single_graph(Broken(kind), tmp_path / "out", input_size=SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.tensorrt
def test_tensorrt_builds_it(detector, tmp_path):
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError, reason="tensorrt_rtx is not installed")
    from mdp_mmdet3d.trt.build import build_engines

    export_single_graph(build(detector), tmp_path / "out", input_size=SIZE, precision="float16")
    assert len(build_engines(tmp_path / "out", load_manifest(tmp_path / "out"), "8.6")["model"]["kernels"]) > 10
