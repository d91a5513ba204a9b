"""The one reader of camera images: training, evaluation and the vehicle see the same pixels. Numpy and Pillow only."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mdp_mmdet3d.errors import FileFormatError

LARGEST_PIXELS = 100_000_000
"""More are a decompression bomb, and no camera's."""

_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_image(path: str | Path) -> np.ndarray:
    """Read an image as (H, W, 3) uint8 RGB, as OpenCV's ``IMREAD_COLOR`` does, which MMDetection3D trains with.

    An EXIF orientation is applied, grey becomes three equal channels, 16 bits are divided by 256, alpha is dropped.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: It is no image, damaged, larger than `LARGEST_PIXELS`, or has no 8 or 16-bit channels.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > LARGEST_PIXELS:
                raise FileFormatError(
                    f"image {path} has {image.width} x {image.height} pixels, {LARGEST_PIXELS:,} are the most"
                )
            image.load()
            turned = ImageOps.exif_transpose(image)
            if turned.mode.startswith("I;16") or (turned.mode == "I" and image.format == "PNG"):
                grey = (np.asarray(turned).astype(np.uint32) >> 8).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            if turned.mode in ("I", "F"):
                raise FileFormatError(
                    f"image {path} has pixels of mode {turned.mode} (32 bits); save it with 8 or 16 bits per channel"
                )
            return np.array(turned.convert("RGB"))
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        raise FileFormatError(
            f"image {path} is truncated, damaged or no image ({type(error).__name__}: {error}); restore it from where "
            "it came from"
        ) from error
