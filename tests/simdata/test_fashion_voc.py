"""Fashion-MNIST's objects in VOC's format: read by MMDetection, from the right split, boxes on the objects."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.simdata import fashion_mnist, fashion_voc
from mdp_mmdet3d.simdata.fashion_mnist import CLASSES
from mdp_mmdet3d.simdata.fashion_voc import HIDDEN, OBJECTS, draw_scene, write_fashion_voc

EVEN, ODD = range(0, 10, 2), range(1, 10, 2)


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A stand-in for Fashion-MNIST: training images have even labels, test images odd ones."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, labels in (("train", EVEN), ("t10k", ODD)):
        images = np.zeros((20, 28, 28), np.uint8)
        images[:, 4:24, 2:26] = rng.integers(100, 256, (20, 20, 24))
        chosen = np.resize(np.array(labels, np.uint8), 20)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(bytes(16) + images.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(bytes(8) + chosen.tobytes())
    shas = {path.name: fashion_mnist.file_sha256(path) for path in folder.iterdir()}
    monkeypatch.setattr(fashion_mnist, "FILES", shas)
    return folder


def test_mmdet_reads_it_and_the_splits_share_no_object(fashion, tmp_path):
    from mmdet.datasets import VOCDataset

    write_fashion_voc(tmp_path / "set", 12, fashion, seed=1, workers=2)
    seen = {}
    for split, count in (("train", 12), ("test", 3)):
        data = VOCDataset(
            data_root=str(tmp_path / "set"),
            ann_file=f"ImageSets/Main/{split}.txt",
            data_prefix=dict(sub_data_root=""),
            metainfo=dict(classes=CLASSES),
        )
        assert len(data) == count
        items = [data.get_data_info(i) for i in range(count)]
        assert all(np.asarray(Image.open(item["img_path"])).shape == (128, 128, 3) for item in items)
        boxes = [box for item in items for box in item["instances"]]
        assert all(0 <= b["bbox"][0] < b["bbox"][2] < 128 and 0 <= b["bbox"][1] < b["bbox"][3] < 128 for b in boxes)
        seen[split] = {box["bbox_label"] for box in boxes}
    assert seen["train"] <= set(EVEN) and seen["test"] <= set(ODD)


def test_boxes_are_tight_and_no_object_is_mostly_hidden():
    """White squares: what is seen of one in its own box is at least what `HIDDEN` leaves of it."""
    images = np.full((1, 28, 28), 255, np.uint8)
    hidden = 0
    for seed in range(40):
        _, objects = draw_scene(np.random.default_rng(seed), images, 96)
        assert 1 <= len(objects) <= OBJECTS[1]
        seen = np.full((96, 96), -1)
        for number, (_, (x, y, width, height)) in enumerate(objects):
            assert x >= 0 and y >= 0 and x + width <= 96 and y + height <= 96
            seen[y : y + height, x : x + width] = number
        shares = [(seen == i).sum() / (box[2] * box[3]) for i, (_, box) in enumerate(objects)]
        assert min(shares) >= 1 - HIDDEN
        hidden += min(shares) < 1
    assert hidden > 5  # occlusion does happen


def test_equal_seeds_give_equal_files_whatever_the_workers(fashion, tmp_path):
    for name, workers, seed in (("a", 1, 3), ("b", 3, 3), ("c", 1, 4)):
        write_fashion_voc(tmp_path / name, 60, fashion, seed=seed, workers=workers)
    content = {
        name: {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*.*")}
        for name in "abc"
    }
    assert len(content["a"]) == 2 * 75 + 2
    assert content["a"] == content["b"]
    assert content["a"].keys() == content["c"].keys() and content["a"] != content["c"]


def test_annotations_name_the_objects_that_were_drawn(fashion, tmp_path):
    told = []
    write_fashion_voc(tmp_path / "set", 8, fashion, on_image=lambda: told.append(1), workers=1)
    assert len(told) == 10
    images, labels = fashion_mnist.read_fashion_mnist(fashion, "train")
    _, objects = draw_scene(np.random.default_rng([0, 0, 5]), images, 128)
    tree = ET.parse(tmp_path / "set" / "Annotations" / "train_000005.xml")
    assert [item.text for item in tree.iterfind("object/name")] == [CLASSES[labels[chosen]] for chosen, _ in objects]


def test_what_cannot_be_written_is_one_clear_error(fashion, tmp_path):
    with pytest.raises(MdpError, match="too few"):
        write_fashion_voc(tmp_path / "set", 3, fashion)
    with pytest.raises(MdpError, match="too small"):
        write_fashion_voc(tmp_path / "set", 8, fashion, side=30)
    with pytest.raises(MdpError, match="not empty"):
        write_fashion_voc(fashion, 8, fashion)
    assert not (tmp_path / "set").exists()


def test_a_failure_leaves_nothing(fashion, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_voc, "fetch_fashion_mnist", lambda folder: False)
    with pytest.raises(FileNotFoundError, match="train-images"):
        write_fashion_voc(tmp_path / "set", 8, tmp_path / "elsewhere", workers=1)
    assert not (tmp_path / "set").exists()


def test_a_negative_seed_is_told_in_one_line(tmp_path):
    tool = Path(__file__).resolve().parents[2] / "tools/create_mini_images.py"
    for kind in ("fashion-voc", "coco"):
        ended = subprocess.run(
            [sys.executable, tool, kind, tmp_path / kind, "--seed", "-1"], capture_output=True, text=True, check=False
        )
        assert ended.returncode == 2 and "error: --seed = -1 must be 0 or more" in ended.stderr
        assert "Traceback" not in ended.stderr and not list(tmp_path.iterdir())
