"""One reader: training and the vehicle see the pixels of OpenCV, with which the published weights were trained."""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from mdp_mmdet3d.errors import FileFormatError
from mdp_mmdet3d.runtime.images import read_image
from projects.streampetr.transforms import read_image as read_for_training

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 60, 3)).astype(np.uint8)


def png_of_size(width: int, height: int) -> bytes:
    """A file of a few bytes that decodes to as many pixels as it likes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def check(path):
    expected = cv2.imread(str(path), cv2.IMREAD_COLOR)
    found = read_image(path)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    np.testing.assert_array_equal(found[..., ::-1], expected)
    np.testing.assert_array_equal(read_for_training(path), expected)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(tmp_path / "x.jpg", exif=exif)
    check(tmp_path / "x.jpg")


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey(tmp_path, suffix):
    cv2.imwrite(str(tmp_path / f"x.{suffix}"), RNG.integers(0, 65536, (40, 60)).astype(np.uint16))
    check(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1"])
def test_modes(tmp_path, mode):
    Image.fromarray(PIXELS).convert(mode).save(tmp_path / "x.png")
    check(tmp_path / "x.png")


@pytest.mark.parametrize(
    "content",
    [b"", b"<html></html>", png_of_size(60000, 60000), png_of_size(12000, 12000), png_of_size(40, 40)],
    ids=["empty", "html", "bomb", "large", "no pixels"],
)
def test_what_is_no_camera_image_is_named(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"x\.png"):
        read_image(tmp_path / "x.png")
