"""Fashion-MNIST's objects on textured backgrounds, in VOC's format: a detection set of real objects for one core.

The objects are photographs, of several sizes and half hidden at most; where they lie, their tint and the textures
behind them are drawn at random. Training images show objects of Fashion-MNIST's training images only, test images of
its test images.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.simdata.fashion_mnist import CLASSES, PIXELS, SPLITS, fetch_fashion_mnist, read_fashion_mnist
from mdp_mmdet3d.simdata.images import new_image_folder, voc_annotation

OBJECTS = (2, 5)  # in an image: at least, at most
SIDES = (0.2, 0.56)  # of an object's 28 pixels, relative to the image's side
HIDDEN = 0.5  # share of an object that later ones may cover
PLACES = 20  # tried for an object before it is left out
SOLID = 32.0  # grey value from which a pixel of an object hides what is behind it
SMALLEST = 16  # pixels of an object; one with fewer is left out
CHUNK = 50  # images a worker writes before it tells

Box = tuple[float, float, float, float]


def write_fashion_voc(
    root: str | Path,
    count: int,
    fashion: str | Path,
    side: int = 128,
    seed: int = 0,
    on_image: Callable = int,
    workers: int | None = None,
) -> None:
    """Write ``JPEGImages``, ``Annotations``, ``ImageSets/Main/{train,test}.txt`` as MMDetection's ``VOCDataset`` wants.

    Args:
        root: Folder to make.
        count: Images to train on; the test set has a quarter of it.
        fashion: Folder with Fashion-MNIST; fetched where it is not there.
        side: Height and width of an image in pixels.
        seed: Equal seeds give equal files, whatever the number of workers.
        on_image: Called without meaning after each image, for progress.
        workers: Processes; None: one for each core.

    Raises:
        MdpError: The folder exists and is not empty, ``count`` is too small, or Fashion-MNIST cannot be fetched.
    """
    if side < 2 * PIXELS:
        raise MdpError(f"images of {side} pixels are too small for several objects: at least {2 * PIXELS}")
    with new_image_folder(root, count) as folder:
        fetch_fashion_mnist(fashion)
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (folder / part).mkdir(parents=True)
        chunks: list[tuple[str, range]] = []
        for split, number in {"train": count, "test": count // 4}.items():
            names = "".join(f"{_name(split, index)}\n" for index in range(number))
            (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(names, encoding="utf-8")
            chunks += [(split, range(at, min(at + CHUNK, number))) for at in range(0, number, CHUNK)]
        write = partial(_write_chunk, folder, Path(fashion), side, seed)
        with ProcessPoolExecutor(workers or len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(write, *chunk) for chunk in chunks]
            try:
                for future in as_completed(futures):
                    for _ in range(future.result()):
                        on_image()
            finally:
                pool.shutdown(cancel_futures=True)


def _name(split: str, index: int) -> str:
    return f"{split}_{index:06d}"


def _write_chunk(folder: Path, fashion: Path, side: int, seed: int, split: str, indices: Sequence[int]) -> int:
    """Write some images of a split; returns how many."""
    images, labels = read_fashion_mnist(fashion, split)
    for index in indices:
        rng = np.random.default_rng([seed, list(SPLITS).index(split), index])
        pixels, objects = draw_scene(rng, images, side)
        name = _name(split, index)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg", quality=92)
        boxes = [(CLASSES[labels[chosen]], box) for chosen, box in objects]
        tree = voc_annotation("fashion", f"{name}.jpg", (side, side), boxes)
        tree.write(folder / "Annotations" / f"{name}.xml", encoding="utf-8")
    return len(indices)


def draw_scene(rng: np.random.Generator, images: np.ndarray, side: int) -> tuple[np.ndarray, list[tuple[int, Box]]]:
    """One picture.

    Args:
        rng: Decides everything.
        images: (N, 28, 28) uint8, objects to choose from.
        side: Height and width in pixels.

    Returns:
        The picture, (side, side, 3) uint8, and of each object its place in ``images`` and its box (x, y, width,
        height) in pixels: all of it, also what is hidden.
    """
    picture = _texture(rng, side)
    masks: list[np.ndarray] = []  # what is still seen of each object
    areas: list[int] = []
    objects: list[tuple[int, Box]] = []
    for _ in range(int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))):
        chosen = int(rng.integers(len(images)))
        grey, alpha = _scaled(rng, np.asarray(images[chosen]), side)
        if (alpha > 0.5).sum() < SMALLEST:
            continue
        height, width = grey.shape
        for _ in range(PLACES):
            top, left = (int(rng.integers(side - extent + 1)) for extent in (height, width))
            window = np.s_[top : top + height, left : left + width]
            solid = np.zeros((side, side), bool)
            solid[window] = alpha > 0.5
            if all((mask & ~solid).sum() >= (1 - HIDDEN) * area for mask, area in zip(masks, areas, strict=True)):
                break
        else:
            continue
        masks = [mask & ~solid for mask in masks] + [solid]
        areas.append(int(solid.sum()))
        tint = rng.uniform(0.45, 1.0, 3)
        colour = np.clip(grey[..., None] * tint + rng.uniform(0, 50), 0, 255)
        picture[window] += alpha[..., None] * (colour - picture[window])
        objects.append((chosen, _box(solid)))
    noisy = picture + rng.normal(0, 4, picture.shape)
    return noisy.clip(0, 255).astype(np.uint8), objects


def _scaled(rng: np.random.Generator, image: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """An object's grey values and how much it hides (0 to 1), float32, in its size in the picture."""
    longest = side * np.exp(rng.uniform(*np.log(SIDES)))
    squeeze = rng.uniform(0.85, 1.0, 2)
    width, height = (max(8, round(longest * share)) for share in squeeze)
    grey = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return grey, (grey / SOLID).clip(0, 1)


def _box(solid: np.ndarray) -> Box:
    rows, columns = (np.flatnonzero(solid.any(axis=axis)) for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Noise of four sizes in two colours and stripes; (side, side, 3) float32."""
    noise = np.zeros((side, side), np.float32)
    for cells in (3, 7, 16, 40):
        coarse = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
        noise += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) * rng.uniform(0.2, 1.0)
    angle, waves = rng.uniform(0, np.pi), rng.uniform(3, 20)
    y, x = np.mgrid[:side, :side] / side
    stripes = np.sin(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 2 * np.pi))
    mix = 1 / (1 + np.exp(-(noise + stripes * rng.uniform(0, 1.2))))
    colours = rng.uniform(20, 220, (2, 3))
    return (colours[0] + mix[..., None] * (colours[1] - colours[0])).astype(np.float32)
