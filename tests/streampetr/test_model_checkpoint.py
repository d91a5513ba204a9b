"""Loading of public checkpoints: names, strictness, safety, and the conversion of AWML's."""

from __future__ import annotations

import datetime
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub

from mdp_mmdet3d.checkpoint.read import read_checkpoint
from mdp_mmdet3d.errors import FileFormatError, StructureMismatchError
from projects.streampetr.checkpoint import (
    AWML_CLASSES,
    CONSTANTS,
    OFFICIAL_CLASSES,
    convert_awml,
    fold_colour_order,
    load_checkpoint,
    load_state_dict,
)

ROOT = Path(__file__).resolve().parents[2]
POINTS = "pts_bbox_head.pseudo_reference_points"


def full_state(model, seed: int = 1) -> dict[str, torch.Tensor]:
    """A state dict as public files have it: other weights than the model's, and an auxiliary head."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in model.state_dict().items():
        first = key.replace(key.split(".")[2], "0", 1) if "_branches." in key else key
        if value.is_floating_point() and key not in CONSTANTS:
            state[key] = state[first] if first in state else torch.rand(value.shape, generator=generator)
        else:
            state[key] = value.clone()
    state["img_roi_head.cls.weight"] = torch.zeros(10, 256, 1, 1)
    state["img_roi_head.cls.bias"] = torch.zeros(10)
    return state


def assert_holds(model, state: dict[str, torch.Tensor]) -> None:
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], msg=key)


def test_names_and_shapes_of_the_reference(build_small, tiny_shapes) -> None:
    own = {key: list(value.shape) for key, value in build_small().state_dict().items()}
    assert own == {key: shape for key, shape in tiny_shapes.items() if not key.startswith("img_roi_head.")}


def test_official_r50_list_loads_strictly(r50_shapes) -> None:
    assert len(r50_shapes) == 591
    config = Config.fromfile(ROOT / "configs/_base_/models/streampetr_r50_704x256_428q.py")
    model = MODELS.build(config.model)
    own = model.state_dict()
    state = {key: own[key] if key in own else torch.zeros(shape) for key, shape in r50_shapes.items()}
    assert {key: list(value.shape) for key, value in state.items()} == r50_shapes
    report = load_state_dict(model, state)
    assert len(report.dropped) == 16 and not report.filled
    assert len(own) == 575
    # 36.07 M parameters without the auxiliary head.
    assert sum(parameter.numel() for parameter in model.parameters()) == 36_072_280


@pytest.mark.parametrize("name", ["r50_704x256_428q", "r50_704x256_900q", "vov99_800x320_900q"])
def test_complete_configs_name_registered_parts(name: str) -> None:
    config = Config.fromfile(ROOT / f"configs/streampetr/streampetr_{name}.py")
    assert config.model.type == "StreamPETR" and config.default_scope == "mmdet3d"
    assert config.test_dataloader.dataset.type == "StreamNuScenesDataset"
    head = config.model.pts_bbox_head
    expected = (300, 128, 512, 128) if "428q" in name else (644, 256, 1024, 256)
    assert (head.num_query, head.num_propagated, head.memory_len, head.topk_proposals) == expected
    assert config.model.img_backbone.type == ("VoVNet" if "vov99" in name else "mmdet.ResNet")


@pytest.mark.parametrize("layout", ["official", "bare", "module.", "model."])
def test_layouts_of_checkpoint_files(build_small, tmp_path: Path, layout: str) -> None:
    model = build_small()
    state = full_state(model)
    prefix = layout if layout.endswith(".") else ""
    data = {prefix + key: value for key, value in state.items()}
    torch.save(data if layout == "bare" else {"state_dict": data}, tmp_path / "a.pth")
    report = load_checkpoint(model, tmp_path / "a.pth")
    assert report.dropped == ("img_roi_head.cls.weight", "img_roi_head.cls.bias")
    assert_holds(model, state)


def test_constants_and_counters_may_be_absent(build_small) -> None:
    model = build_small()
    state = full_state(model)
    reduced = {k: v for k, v in state.items() if k not in CONSTANTS and not k.endswith("num_batches_tracked")}
    assert set(load_state_dict(model, reduced).filled) == set(state) - set(reduced)
    assert_holds(model, state)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pts_bbox_head.pc_range", torch.ones(6), r"pts_bbox_head\.pc_range is \[1\.0"),
        (
            "pts_bbox_head.cls_branches.3.6.bias",
            torch.zeros(10),
            r"cls_branches\.3\.6\.bias differs from pts_bbox_head\.cls_branches\.0\.6\.bias",
        ),
        ("pts_bbox_head.reference_points.weight", torch.zeros(7, 3), r"expected \(60, 3\), found \(7, 3\)"),
        ("img_backbone.conv1.weight", None, r"img_backbone\.conv1\.weight expected .* not found"),
        ("backbone.extra", torch.zeros(2), r"backbone\.extra not expected, found \(2,\)"),
    ],
)
def test_another_model_is_refused_and_nothing_is_changed(build_small, key: str, value, message: str) -> None:
    model = build_small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = full_state(model)
    state.pop(key, None)
    if value is not None:
        state[key] = value
    with pytest.raises(StructureMismatchError, match=message):
        load_state_dict(model, state, "a.pth")
    assert_holds(model, before)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"none\.pth does not exist"):
        read_checkpoint(tmp_path / "none.pth")
    whole = tmp_path / "whole.pth"
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, whole)
    (tmp_path / "half.pth").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "text.pth").write_text("no checkpoint at all")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": 3}, tmp_path / "other.pth")
    for name in ("half", "text", "list", "other"):
        with pytest.raises(FileFormatError, match=rf"{name}\.pth"):
            read_checkpoint(tmp_path / f"{name}.pth")


def test_what_a_checkpoint_holds_instead_of_weights_is_said(tmp_path: Path) -> None:
    weights = {"a": torch.zeros(2), "b": torch.zeros(2)}
    for content, message in (
        (
            {"other": weights, "epoch": 3},
            r"no entry state_dict and is no .*: it holds other \(2 tensors\), epoch \(int\)",
        ),
        ({"state_dict": [1, 2], "epoch": 3}, r"its entry state_dict is no state dict: it is a list"),
        ({"state_dict": {}}, r"its entry state_dict is no state dict: it holds nothing"),
        ({"state_dict": {**weights, "c": 1}}, r"it holds a \(tensor \(2,\)\), b \(tensor \(2,\)\), c \(int\)"),
        ({1: torch.zeros(2)}, r"it holds 1 \(tensor \(2,\)\)"),
    ):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(FileFormatError, match=message) as error:
            read_checkpoint(tmp_path / "x.pth")
        assert "its keys: state_dict" not in str(error.value)


@pytest.mark.parametrize("meta", ["by me", 3, [1]])
def test_a_meta_that_is_no_dictionary_is_left_out_with_a_warning(build_small, tmp_path: Path, meta, caplog) -> None:
    model = build_small()
    torch.save({"state_dict": full_state(model), "meta": meta}, tmp_path / "x.pth")
    assert read_checkpoint(tmp_path / "x.pth")["meta"] == {}
    load_checkpoint(build_small(), tmp_path / "x.pth")
    assert f"x.pth: its meta is a {type(meta).__name__}" in caplog.text


def test_entries_of_the_meta_that_are_none_are_named(build_small, tmp_path: Path) -> None:
    model = build_small()
    torch.save({"state_dict": full_state(model), "meta": {"streampetr_eps": "1e-5"}}, tmp_path / "x.pth")
    with pytest.raises(FileFormatError, match=r"meta\.streampetr_eps is '1e-5', not a number"):
        load_checkpoint(model, tmp_path / "x.pth")


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


class AttributeExploit:
    def __reduce__(self):
        return getattr, (MessageHub, "get_instance")


@pytest.mark.parametrize("payload", [Exploit, AttributeExploit])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch, payload: type) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "meta": {"x": payload()}}, "bad.pth")
    with pytest.raises(FileFormatError, match=r"bad\.pth is corrupt or holds more than tensors"):
        read_checkpoint("bad.pth")
    assert not Path("exploited").exists()


def test_checkpoints_of_mmengine_can_be_read(tmp_path: Path) -> None:
    hub = MessageHub("streampetr-checkpoint-test")
    hub.update_scalar("loss", 0.25)
    torch.save({"state_dict": {"a": torch.ones(2)}, "message_hub": hub.state_dict()}, tmp_path / "m.pth")
    data = read_checkpoint(tmp_path / "m.pth")
    assert data["message_hub"]["log_scalars"]["loss"].current() == 0.25
    assert data["meta"] == {}


def awml_state(model) -> dict[str, torch.Tensor]:
    state = full_state(model)
    state[POINTS] = state.pop(POINTS + ".weight")
    return state


def test_awml_names_and_class_order(build_small) -> None:
    model = build_small()
    source = awml_state(model)
    converted = convert_awml(source)
    load_state_dict(model, converted)
    torch.testing.assert_close(converted[POINTS + ".weight"], source[POINTS])
    for leaf in ("weight", "bias"):
        key = f"pts_bbox_head.cls_branches.5.6.{leaf}"
        for row, name in enumerate(OFFICIAL_CLASSES):
            torch.testing.assert_close(converted[key][row], source[key][AWML_CLASSES.index(name)])
    inner = "pts_bbox_head.cls_branches.0.3.weight"
    torch.testing.assert_close(converted[inner], source[inner])


def test_awml_with_other_classes_is_refused(build_small) -> None:
    source = awml_state(build_small())
    with pytest.raises(StructureMismatchError, match="are not the target's"):
        convert_awml(source, source_classes=("car", "bus"))
    with pytest.raises(StructureMismatchError, match="has 10 rows, not 2"):
        convert_awml(source, source_classes=("car", "bus"), target_classes=("bus", "car"))


@pytest.fixture
def convert(monkeypatch) -> Callable[..., int]:
    """Function that runs the tool in this process and returns its exit status."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools/convert_checkpoint.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
        return tool.main()

    return run


def test_conversion_tool(build_small, tmp_path: Path, convert) -> None:
    source, target = tmp_path / "awml.pth", tmp_path / "converted.pth"
    torch.save({"state_dict": awml_state(build_small())}, source)
    assert convert(source, target, "--from", "awml") == 0
    with pytest.raises(StructureMismatchError, match=r"trained with eps=0\.0001, the model has 1e-05"):
        load_checkpoint(build_small(), target)
    model = build_small(eps=1e-4)
    load_checkpoint(model, target)
    torch.testing.assert_close(model.pts_bbox_head.pseudo_reference_points.weight, awml_state(model)[POINTS])


def test_conversion_tool_refuses_another_model(build_small, tmp_path: Path, convert, capsys) -> None:
    source, target = tmp_path / "small.pth", tmp_path / "converted.pth"
    torch.save({"state_dict": full_state(build_small())}, source)
    config = ROOT / "configs/streampetr/streampetr_r50_704x256_428q.py"
    assert convert(source, target, "--config", config) == 2
    assert "is of another model" in capsys.readouterr().err
    assert not target.exists()


def prefixed(state: dict, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


def zeros(state: dict) -> dict[str, torch.Tensor]:
    return {key: torch.zeros_like(value) for key, value in state.items()}


def ema(state: dict) -> dict[str, torch.Tensor]:
    return {"ema_" + key.replace(".", "_"): value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"module": s},
        lambda s: {"model_state_dict": s},
        lambda s: {"state_dict": prefixed(s, "module.module.")},
        lambda s: {"state_dict": prefixed(s, "_orig_mod.")},
        lambda s: {"state_dict": prefixed(s, "architecture.")},
        lambda s: {"state_dict": prefixed(s, "student.") | prefixed(zeros(s), "teacher.")},
        lambda s: {"state_dict": prefixed(s, "module.") | {"steps": torch.tensor(7)}},
        lambda s: {"ema_state_dict": prefixed(s, "module.") | {"steps": torch.tensor(7)}},
        lambda s: {"state_dict": s, "ema_state_dict": zeros(s)},
        lambda s: {"state_dict": s | ema(zeros(s))},
        lambda s: {"state_dict": s | prefixed(zeros(s), "ema_")},
        lambda s: {"state_dict": ema(s)},
        lambda s: {"state_dict": ema(s | {"img_roi_head.cls.weight": torch.ones(2)})},
    ],
)
def test_files_of_other_makers(build_small, tmp_path: Path, wrap) -> None:
    target = build_small()
    state = {key: value for key, value in full_state(target).items() if key in target.state_dict()}
    torch.save(wrap(state), tmp_path / "x.pth")
    load_checkpoint(target, tmp_path / "x.pth")
    for key, value in target.state_dict().items():
        assert torch.equal(state[key], value), key


def test_averaged_weights_alone_are_not_converted_without_the_names_of_a_model(build_small, tmp_path, convert, capsys):
    target = tmp_path / "y.pth"
    torch.save({"state_dict": ema(full_state(build_small()))}, tmp_path / "x.pth")
    assert convert(tmp_path / "x.pth", target) == 2 and not target.exists()
    assert "whose names have lost their dots (e.g. ema_img_backbone_conv1_weight)" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_and_the_model_keeps_its_own_constants(build_small, tmp_path: Path, dtype) -> None:
    target = build_small()
    source = full_state(target)
    constants = {key: value.clone() for key, value in target.state_dict().items() if key in CONSTANTS}
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in source.items()}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    load_checkpoint(target, tmp_path / "x.pth")
    assert all(torch.equal(target.state_dict()[key], value) for key, value in constants.items())
    key = "img_backbone.conv1.weight"
    torch.testing.assert_close(target.state_dict()[key], source[key], rtol=1e-2, atol=1e-3)
    assert target.state_dict()[key].dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(build_small, tmp_path: Path, value) -> None:
    state = full_state(build_small())
    state["img_backbone.conv1.weight"] = state["img_backbone.conv1.weight"].clone()
    state["img_backbone.conv1.weight"][0, 0, 0, 0] = value
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    with pytest.raises(FileFormatError, match=r"img_backbone\.conv1\.weight holds 1 of \d+ values that are NaN or inf"):
        load_checkpoint(build_small(), tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs pointer"),
        (b"\n<!DOCTYPE html>\n<html>", "web page"),
        (b"", "is empty"),
    ],
)
def test_what_is_taken_for_a_checkpoint_is_named(tmp_path: Path, content, message) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(FileFormatError, match=rf"x\.pth {message}|x\.pth is a {message}"):
        read_checkpoint(tmp_path / "x.pth")


def test_a_pickle_is_refused_by_the_name_of_its_types_and_read_if_trusted(build_small, tmp_path: Path, convert) -> None:
    source, copy = tmp_path / "x.pth", tmp_path / "copy.pth"
    meta = {"config": ConfigDict(a=1), "time": datetime.datetime(2026, 1, 1)}
    torch.save({"state_dict": full_state(build_small()), "meta": meta}, source)
    with pytest.raises(FileFormatError, match=r": datetime\.datetime, mmengine.*\.ConfigDict\. .*--trust") as error:
        read_checkpoint(source)
    assert "\x1b" not in str(error.value)
    assert convert(source, copy, "--trust") == 0
    load_checkpoint(build_small(), copy)


def test_colour_order_is_folded_into_the_first_convolution(build_small) -> None:
    model = build_small()
    images = torch.randn(1, 3, 64, 96)
    expected = model.img_backbone(images)[0]
    model.load_state_dict(fold_colour_order(model.state_dict()))
    torch.testing.assert_close(model.img_backbone(images.flip(1))[0], expected, rtol=1e-4, atol=1e-4)
