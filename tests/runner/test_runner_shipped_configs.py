"""Paths in configs: of shipped ones relative to the repository, of the user as given, of written ones fixed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from mdp_mmdet3d.adapters import InputShape, SingleGraph, adapter_of
from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.datasets.identity import data_identity
from mdp_mmdet3d.runner.outputs import write_pruned_config

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs").rglob("*.py"))
VARIABLES = (
    "NUSCENES_ROOT", "MINI_NUSCENES_ROOT", "VOC_ROOT", "COCO_ROOT", "FASHION_MNIST_ROOT", "FASHION_VOC_ROOT",
    "MDP_SHARED_DATA",
)  # fmt: skip
PATHS = ("data_root", "checkpoint", "load_from", "plan")
ON_THE_WEB = ("torchvision://", "open-mmlab://", "https://")


def paths(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every local file or folder that a config names: key and path; info files that are relative to a data root not."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name != "ann_file" or "data_root" not in value:  # a data set joins the two
                yield from paths(item, name)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from paths(item, key)
    elif isinstance(value, str) and (key in PATHS or (key == "ann_file" and "/" in value)):
        yield from () if value.startswith(ON_THE_WEB) else ((key, value),)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Stand in another folder, without the variables that name data."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.relative_to(ROOT / "configs").as_posix())
def test_paths_of_a_shipped_config_lie_in_the_repository(path) -> None:
    for key, value in paths(Config.fromfile(path).to_dict()):
        assert Path(value).is_absolute() and ".." not in value, (key, value)
        # Downloads stay out of the repository: in a cache folder.
        elsewhere = (ROOT.parent / "shared/data/nuscenes_frame", Path.home() / ".cache/mdp_mmdet3d/fashion_mnist")
        assert Path(value).is_relative_to(ROOT) or Path(value) in elsewhere, (key, value)


def test_the_named_places_are_the_documented_ones() -> None:
    config = read_config(ROOT / "configs/streampetr_mini_mdp.py")
    assert config.checkpoint == str(ROOT / "checkpoints/streampetr_mini.pth")
    assert config.data_root == config.test_dataloader.dataset.data_root == str(ROOT / "data/mini_easy")
    assert config.test_evaluator.ann_file == str(ROOT / "data/mini_easy/nuscenes_infos_val.pkl")
    assert read_config(ROOT / "configs/streampetr_mdp.py").data_root == str(ROOT / "data/nuscenes")
    trained = read_config(ROOT / "configs/streampetr/streampetr_r50_704x256_428q_24e.py")
    assert Path(trained.model.img_backbone.init_cfg.checkpoint).parent == ROOT / "ckpts"
    wide = read_config(ROOT / "configs/streampetr/streampetr_vov99_800x320_900q_24e.py")
    assert wide.load_from == str(ROOT / "ckpts/fcos3d_vovnet_imgbackbone-remapped.pth")


def test_the_demo_finds_its_checkpoint_from_another_folder() -> None:
    config = read_config(ROOT / "configs/streampetr_mini_mdp.py")
    assert adapter_of(config, InputShape(6, 64, 176)).build(config.checkpoint)[1].startswith("streampetr_mini.pth@")


def test_folders_of_the_user_stay_as_given(monkeypatch) -> None:
    monkeypatch.setenv("NUSCENES_ROOT", "my data/nuscenes")
    monkeypatch.setenv("MINI_NUSCENES_ROOT", "../mini")
    monkeypatch.setenv("MDP_SHARED_DATA", "shared")
    assert read_config(ROOT / "configs/streampetr_mdp.py").importance_dataloader.dataset.data_root == "my data/nuscenes"
    assert read_config(ROOT / "configs/streampetr_mini.py").train_dataloader.dataset.data_root == "../mini"
    frame = read_config(ROOT / "configs/streampetr_mdp_frame.py")
    assert frame.test_dataloader.dataset.data_root == "shared/nuscenes_frame"
    given = read_config(ROOT / "configs/streampetr_mdp.py", {"checkpoint": "mine.pth"})
    assert given.checkpoint == "mine.pth"


@pytest.mark.parametrize("place", ["with space", "c++ (1)/x", "über"])
def test_a_copy_of_the_repository_names_its_own_files_wherever_it_lies(place, elsewhere) -> None:
    copied = elsewhere / place / "repository"
    shutil.copytree(ROOT / "configs", copied / "configs")
    config = read_config(copied / "configs/streampetr_mini_mdp.py")
    assert config.checkpoint == str(copied / "checkpoints/streampetr_mini.pth")
    assert config.data_root == str(copied / "data/mini_easy")


def test_a_written_config_names_the_data_that_it_was_made_with(elsewhere, monkeypatch) -> None:
    monkeypatch.setenv("MINI_NUSCENES_ROOT", "data/mini")
    work_dir = elsewhere / "work"
    write_pruned_config(work_dir / "pruned_config.py", read_config(ROOT / "configs/streampetr_mini_mdp.py"))
    (elsewhere / "later").mkdir()
    monkeypatch.chdir(elsewhere / "later")
    monkeypatch.delenv("MINI_NUSCENES_ROOT")
    moved = work_dir.rename(elsewhere / "moved")
    config = Config.fromfile(moved / "pruned_config.py")
    root = str(elsewhere / "data/mini")
    for loader in ("train_dataloader", "importance_dataloader", "test_dataloader"):
        assert config[loader].dataset.data_root == root
    assert config.train_dataloader.dataset.ann_file == "nuscenes_infos_train.pkl"  # relative to the root
    assert config.test_evaluator.ann_file == f"{root}/nuscenes_infos_val.pkl"
    assert config.test_evaluator.data_root == root
    assert config.model.plan == str(moved / "plan.json") and config.load_from == str(moved / "pruned.pth")
    assert {Path(value).is_absolute() for _, value in paths(config.to_dict())} == {True}


def test_data_elsewhere_on_the_net_stay_as_given(elsewhere) -> None:
    dataset = dict(data_root="s3://bucket/nuscenes", ann_file="infos.pkl")
    config = Config(dict(model=dict(type="A"), test_dataloader=dict(dataset=dataset)))
    config.importance_dataloader = dict(dataset=dataset)
    write_pruned_config(elsewhere / "c.py", config)
    assert Config.fromfile(elsewhere / "c.py").test_dataloader.dataset.to_dict() == dataset
    assert SingleGraph(config, InputShape(6, 64, 176)).data_identity() == "s3://bucket/nuscenes/infos.pkl"


def test_one_data_set_has_one_identity_however_it_is_spelled(elsewhere, monkeypatch) -> None:
    found = set()
    for root in ("data/nuscenes", "./data/nuscenes/", str(elsewhere / "data/nuscenes"), "x/../data/nuscenes"):
        monkeypatch.setenv("NUSCENES_ROOT", root)
        found.add(adapter_of(read_config(ROOT / "configs/streampetr_mdp.py"), InputShape(6, 64, 176)).data_identity())
    assert found == {str(elsewhere / "data/nuscenes/nuscenes_infos_train.pkl")}


def test_other_data_at_the_same_path_are_other_data(tmp_path) -> None:
    dataset = dict(data_root=str(tmp_path), ann_file="infos.pkl")
    config = Config(
        dict(model=dict(type="A"), importance_dataloader=dict(dataset=dict(type="Repeat", dataset=dataset)))
    )
    found = []
    for content in (b"one", b"two", b"one"):
        (tmp_path / "infos.pkl").write_bytes(content)
        found.append(SingleGraph(config, InputShape(6, 64, 176)).data_identity())
    assert found[0] == found[2] != found[1] and found[0].startswith("infos.pkl@")


def test_a_folder_without_an_info_file_is_known_by_its_files(tmp_path) -> None:
    image = tmp_path / "set" / "train" / "cat" / "1.jpg"
    image.parent.mkdir(parents=True)
    dataset = dict(type="ImageNet", data_root=str(tmp_path / "set"), split="train")
    found = []
    for content in ("one", "another", "one"):
        image.write_text(content)
        found.append(data_identity(dataset))
    assert found[0] == found[2] != found[1] and found[0].startswith("set@")
    assert data_identity({**dataset, "split": "val"}) != found[0]
    (tmp_path / "moved").mkdir()
    (tmp_path / "set").rename(tmp_path / "moved" / "set")
    assert data_identity({**dataset, "data_root": str(tmp_path / "moved" / "set")}) == found[0]
