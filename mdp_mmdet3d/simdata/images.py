"""Small generated image sets in real formats: an ImageNet folder, COCO, a VOC devkit; for lines without real data.

Coloured shapes of several sizes lie on smooth noise. A network learns them in minutes; nothing measured on them says
anything about real photographs.
"""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.together import new_folder

SHAPES = {"sports ball": 40, "kite": 3, "book": 4, "stop sign": 8}  # COCO's name: corners
COLOURS = ((214, 64, 52), (58, 110, 205))
# All 80 classes of COCO in the order of their ids: heads of published configs have 80 outputs.
COCO_CLASSES = [
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
]  # fmt: skip
# VOC has no names of shapes; these are of its 20 classes, in the order of `SHAPES`.
VOC_NAMES = ("bicycle", "boat", "tvmonitor", "car")
_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
MOST_IMAGES = 1_000_000


def write_image_folder(
    root: str | Path, count: int = 64, size: tuple[int, int] = (256, 256), seed: int = 0, on_image: Callable = int
) -> list[str]:
    """Write ``train/<class>/*.jpg``, ``val/<class>/*.jpg`` and ``meta/*.txt`` as MMPretrain's ``ImageNet`` reads them.

    Args:
        root: Folder to make.
        count: Images of the training set; the validation set has a quarter of it.
        size: Width and height in pixels.
        seed: Equal seeds give equal images.
        on_image: Called without meaning after each image, for progress.

    Returns:
        The class names: a shape in a colour.

    Raises:
        MdpError: The folder exists and is not empty, or ``count`` is too small.
    """
    rng = np.random.default_rng(seed)
    names = [f"{shape.replace(' ', '_')}_{colour}" for shape in SHAPES for colour in range(len(COLOURS))]
    with new_image_folder(root, count) as root:
        (root / "meta").mkdir(parents=True)
        for split, number in (("train", count), ("val", max(len(names), count // 4))):
            lines = []
            for index in range(number):
                label = index % len(names)
                folder = root / split / names[label]
                folder.mkdir(parents=True, exist_ok=True)
                image = _background(rng, size)
                _draw(image, rng, label // len(COLOURS), label % len(COLOURS), min(size) * rng.uniform(0.3, 0.7))
                image.save(folder / f"{index:05d}.jpg", quality=92)
                lines.append(f"{names[label]}/{index:05d}.jpg {label}\n")
                on_image()
            # With a list, a head of 1000 classes accepts that there are folders of a few only.
            (root / "meta" / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    return names


def write_coco(
    root: str | Path, count: int = 32, size: tuple[int, int] = (640, 480), seed: int = 0, on_image: Callable = int
) -> None:
    """Write ``train2017``, ``val2017`` and ``annotations/instances_*.json`` in COCO's format, with its 80 categories.

    Args:
        root: Folder to make.
        count: Images of the training set; the validation set has a quarter of it.
        size: Width and height in pixels.
        seed: Equal seeds give equal images.
        on_image: Called without meaning after each image, for progress.

    Raises:
        MdpError: The folder exists and is not empty, or ``count`` is too small.
    """
    rng = np.random.default_rng(seed)
    ids = dict(zip(COCO_CLASSES, (i for i in range(1, 91) if i not in _UNUSED_IDS), strict=True))
    categories = [{"id": number, "name": name, "supercategory": "thing"} for name, number in ids.items()]
    with new_image_folder(root, count) as root:
        (root / "annotations").mkdir(parents=True)
        for split, number in (("train2017", count), ("val2017", max(4, count // 4))):
            (root / split).mkdir()
            images: list[dict] = []
            annotations: list[dict] = []
            for index in range(number):
                image = _background(rng, size)
                for _ in range(int(rng.integers(2, 7))):
                    shape = int(rng.integers(len(SHAPES)))
                    diameter = min(size) * rng.uniform(0.1, 0.5)
                    x, y, width, height = _draw(image, rng, shape, int(rng.integers(len(COLOURS))), diameter)
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": index,
                            "category_id": ids[list(SHAPES)[shape]],
                            "bbox": [x, y, width, height],
                            "area": width * height,
                            "iscrowd": 0,
                            "segmentation": [],
                        }
                    )
                name = f"{index:012d}.jpg"
                image.save(root / split / name, quality=92)
                images.append({"id": index, "file_name": name, "width": size[0], "height": size[1]})
                on_image()
            content = {"images": images, "annotations": annotations, "categories": categories}
            (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def write_voc(
    root: str | Path, count: int = 32, size: tuple[int, int] = (500, 375), seed: int = 0, on_image: Callable = int
) -> None:
    """Write ``VOC2007`` and ``VOC2012`` in the layout of VOC's devkit, as MMDetection's ``VOCDataset`` reads it.

    Both have ``JPEGImages``, ``Annotations`` and ``ImageSets/Main/trainval.txt``; ``VOC2007`` has ``test.txt`` too.

    Args:
        root: Folder to make; the place of ``VOCdevkit``.
        count: Images to train on, half of them in each year; the test set has a quarter of it.
        size: Width and height in pixels.
        seed: Equal seeds give equal images.
        on_image: Called without meaning after each image, for progress.

    Raises:
        MdpError: The folder exists and is not empty, or ``count`` is too small.
    """
    rng = np.random.default_rng(seed)
    late = count // 2
    with new_image_folder(root, count) as root:
        for year, splits in (
            ("2007", {"trainval": count - late, "test": max(4, count // 4)}),
            ("2012", {"trainval": late}),
        ):
            folder = root / f"VOC{year}"
            for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
                (folder / part).mkdir(parents=True)
            first = 1
            for split, number in splits.items():
                names = [
                    f"{index:06d}" if year == "2007" else f"2012_{index:06d}" for index in range(first, first + number)
                ]
                first += number
                for name in names:
                    image = _background(rng, size)
                    boxes = []
                    for _ in range(int(rng.integers(2, 6))):
                        shape = int(rng.integers(len(SHAPES)))
                        diameter = min(size) * rng.uniform(0.15, 0.5)
                        box = _draw(image, rng, shape, int(rng.integers(len(COLOURS))), diameter)
                        boxes.append((VOC_NAMES[shape], box))
                    image.save(folder / "JPEGImages" / f"{name}.jpg", quality=92)
                    tree = voc_annotation(f"VOC{year}", f"{name}.jpg", size, boxes)
                    tree.write(folder / "Annotations" / f"{name}.xml", encoding="utf-8")
                    on_image()
                listed = "".join(f"{name}\n" for name in names)
                (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(listed, encoding="utf-8")


def voc_annotation(
    folder: str, file: str, size: tuple[int, int], boxes: list[tuple[str, tuple[float, float, float, float]]]
) -> ET.ElementTree:
    """One image's objects (name, and x, y, width, height in pixels) in VOC's XML.

    The corners are whole pixels counted from 1, the last one inside of the object.
    """
    top = ET.Element("annotation")
    for tag, value in (("folder", folder), ("filename", file), ("segmented", 0)):
        ET.SubElement(top, tag).text = str(value)
    extent = ET.SubElement(top, "size")
    for tag, value in (("width", size[0]), ("height", size[1]), ("depth", 3)):
        ET.SubElement(extent, tag).text = str(value)
    for name, (x, y, width, height) in boxes:
        item = ET.SubElement(top, "object")
        for tag, value in (("name", name), ("pose", "Unspecified"), ("truncated", 0), ("difficult", 0)):
            ET.SubElement(item, tag).text = str(value)
        corners = ET.SubElement(item, "bndbox")
        right, bottom = min(size[0], math.ceil(x + width)), min(size[1], math.ceil(y + height))
        for tag, value in (("xmin", int(x) + 1), ("ymin", int(y) + 1), ("xmax", right), ("ymax", bottom)):
            ET.SubElement(corners, tag).text = str(value)
    ET.indent(top, "\t")
    return ET.ElementTree(top)


@contextmanager
def new_image_folder(root: str | Path, count: int) -> Iterator[Path]:
    """A folder beside ``root`` that takes its place at the end: a killed run leaves nothing that looks complete."""
    path = Path(root)
    if path.exists() and not path.is_dir():
        raise MdpError(f"{path} is a file; name a folder")
    if path.exists() and any(path.iterdir()):
        raise MdpError(f"{path} exists and is not empty; name another folder or delete it")
    if count < len(SHAPES) * len(COLOURS):
        raise MdpError(f"{count} images are too few: at least {len(SHAPES) * len(COLOURS)}, one per class")
    if count > MOST_IMAGES:
        raise MdpError(f"{count} images are too many: {MOST_IMAGES} at most")
    with new_folder(path) as part:
        yield part


def _background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    coarse = rng.integers(60, 200, (6, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + rng.integers(-12, 13, (size[1], size[0], 3), dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _draw(
    image: Image.Image, rng: np.random.Generator, shape: int, colour: int, diameter: float
) -> tuple[float, float, float, float]:
    """Draw a shape inside of the image; returns its box (x, y, width, height) in pixels."""
    radius = diameter / 2
    centre = [rng.uniform(radius, extent - radius) for extent in image.size]
    corners, turn = list(SHAPES.values())[shape], rng.uniform(0, 2 * math.pi)
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    points = [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]
    shade = tuple(int(np.clip(c + rng.integers(-25, 26), 0, 255)) for c in COLOURS[colour])
    ImageDraw.Draw(image).polygon(points, fill=shade)
    (left, top), (right, bottom) = np.min(points, axis=0).tolist(), np.max(points, axis=0).tolist()
    return left, top, right - left, bottom - top
