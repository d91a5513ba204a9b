"""The generated image sets are read by the data sets they are made for, with the right labels and boxes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.simdata.images import COCO_CLASSES, VOC_NAMES, write_coco, write_image_folder, write_voc

ROOT = Path(__file__).resolve().parents[2]


def test_coco_is_read_by_mmdet_with_its_own_classes(tmp_path):
    from mmdet.datasets import CocoDataset

    write_coco(tmp_path, 8, (160, 120))
    data = CocoDataset(
        data_root=str(tmp_path), ann_file="annotations/instances_train2017.json", data_prefix=dict(img="train2017/")
    )
    assert tuple(COCO_CLASSES) == data.METAINFO["classes"]
    assert len(data) == 8
    names = {data.metainfo["classes"][box["bbox_label"]] for i in range(8) for box in data[i]["instances"]}
    assert names <= {"sports ball", "kite", "book", "stop sign"} and len(names) > 1


def test_boxes_hold_the_shape(tmp_path):
    """Inside a box the picture differs from the smooth background much more than right outside of it."""
    write_coco(tmp_path, 8, (160, 120), seed=3)
    content = json.loads((tmp_path / "annotations/instances_train2017.json").read_text())
    images = {item["id"]: item for item in content["images"]}
    for box in content["annotations"]:
        x, y, width, height = box["bbox"]
        info = images[box["image_id"]]
        assert x >= 0 and y >= 0 and x + width <= info["width"] and y + height <= info["height"]
    last = content["annotations"][-1]  # nothing was drawn over it
    x, y, width, height = last["bbox"]
    pixels = np.asarray(Image.open(tmp_path / "train2017" / images[last["image_id"]]["file_name"]), np.float32)
    centre = pixels[int(y + height / 2), int(x + width / 2)]
    assert abs(centre[0] - centre[2]) > 60  # red or blue; the background is nearly grey at most


def test_a_voc_devkit_is_read_by_mmdet_with_its_boxes_on_the_shapes(tmp_path):
    from mmdet.datasets import VOCDataset

    write_voc(tmp_path, 9, (120, 90), seed=2)
    counts = {}
    for year, split in (("2007", "trainval"), ("2012", "trainval"), ("2007", "test")):
        data = VOCDataset(
            data_root=str(tmp_path),
            ann_file=f"VOC{year}/ImageSets/Main/{split}.txt",
            data_prefix=dict(sub_data_root=f"VOC{year}/"),
            test_mode=split == "test",
        )
        counts[year, split] = len(data)
        for i in range(len(data)):
            item = data.get_data_info(i)
            pixels = np.asarray(Image.open(item["img_path"]), np.float32)
            assert pixels.shape == (90, 120, 3) and not any(box["ignore_flag"] for box in item["instances"])
            for box in item["instances"]:
                left, top, right, bottom = box["bbox"]
                assert 0 <= left < right < 120 and 0 <= top < bottom < 90
            assert {data.METAINFO["classes"][box["bbox_label"]] for box in item["instances"]} <= set(VOC_NAMES)
            left, top, right, bottom = item["instances"][-1]["bbox"]  # nothing was drawn over it
            centre = pixels[(top + bottom) // 2, (left + right) // 2]
            assert abs(centre[0] - centre[2]) > 60  # red or blue; the background is nearly grey at most
    assert counts == {("2007", "trainval"): 5, ("2012", "trainval"): 4, ("2007", "test"): 4}


def test_the_image_folder_is_read_by_mmpretrain_although_the_head_has_1000_classes(tmp_path):
    pytest.importorskip("mmpretrain")
    from mmpretrain.datasets import ImageNet

    names = write_image_folder(tmp_path, 16, (48, 40))
    data = ImageNet(data_root=str(tmp_path), split="train")
    assert len(data) == 16
    for i in range(16):
        item = data.get_data_info(i)
        assert names[item["gt_label"]] in item["img_path"]


def test_equal_seeds_give_equal_files(tmp_path):
    for name in "ab":
        write_image_folder(tmp_path / name, 8, (32, 32), seed=5)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 18 and all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(MdpError, match="not empty"):
        write_coco(tmp_path, 8)
    with pytest.raises(MdpError, match="not empty"):
        write_voc(tmp_path, 8)
    with pytest.raises(MdpError, match="too few"):
        write_coco(tmp_path / "new", 3)
    with pytest.raises(MdpError, match="is a file"):
        write_coco(tmp_path / "mine.txt", 8)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("write", [write_image_folder, write_coco, write_voc])
def test_a_run_that_was_killed_leaves_nothing_that_looks_complete(write, tmp_path) -> None:
    root, code = tmp_path / "set", "import os, sys; from mdp_mmdet3d.simdata.images import {0} as write; "
    code += "left = iter(range(4)); write(sys.argv[1], 8, on_image=lambda: next(left, None) is None and os._exit(9))"
    done = subprocess.run([sys.executable, "-c", code.format(write.__name__), str(root)], cwd=ROOT)
    assert done.returncode == 9 and not root.exists() and list(tmp_path.iterdir())
    write(root, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(list(root.rglob("*.jpg"))) > 8
