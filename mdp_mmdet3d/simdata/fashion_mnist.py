"""Fashion-MNIST, 70,000 real images of 28x28 pixels (Xiao et al. 2017, MIT licence), from Debian's package archive."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import file_sha256

PACKAGE = "dataset-fashion-mnist"
WHERE = "usr/share/datasets/fashion-mnist"
INSTALLED = Path("/", WHERE)
# Of the unpacked files, as MMPretrain's FashionMNIST reads them.
FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
SPLITS = {"train": "train", "test": "t10k"}
PIXELS = 28  # of an image's height and width
TIMEOUT_S = 600


def fashion_mnist_folder() -> Path:
    """Where the configs look for it: ``FASHION_MNIST_ROOT``, else the cache of this package."""
    return Path(os.environ.get("FASHION_MNIST_ROOT") or "~/.cache/mdp_mmdet3d/fashion_mnist").expanduser()


def read_fashion_mnist(folder: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one of `SPLITS`, mapped into memory, not copied.

    Returns:
        (N, 28, 28) uint8, bright objects on black, and (N,) uint8, places in `CLASSES`.
    """
    name = SPLITS[split]
    images = np.memmap(Path(folder, f"{name}-images-idx3-ubyte"), np.uint8, "r", offset=16)
    labels = np.memmap(Path(folder, f"{name}-labels-idx1-ubyte"), np.uint8, "r", offset=8)
    return images.reshape(-1, PIXELS, PIXELS), labels


def fetch_fashion_mnist(folder: str | Path) -> bool:
    """Write the four IDX files into a folder; what lies there already and is right stays.

    They come from ``/usr/share/datasets`` where the Debian package is installed, else from a download of it (31 MB,
    ``apt-get download``, no rights needed).

    Args:
        folder: Made where it does not exist; keep it outside of a repository.

    Returns:
        Whether anything was written.

    Raises:
        MdpError: There is no apt-get or no registry, or a file is not the published one.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise MdpError(f"{folder} is a file; name a folder")
    missing = [name for name, sha in FILES.items() if not _right(folder / name, sha)]
    if not missing:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        source = INSTALLED if INSTALLED.is_dir() else _download(Path(scratch)) / WHERE
        for name in missing:
            part = Path(scratch, name)
            try:
                with gzip.open(source / f"{name}.gz") as packed, part.open("wb") as out:
                    shutil.copyfileobj(packed, out)
            except (OSError, EOFError) as error:
                raise MdpError(f"{source / name}.gz of {PACKAGE} cannot be read: {error}") from error
            if not _right(part, FILES[name]):
                raise MdpError(
                    f"{name} of {PACKAGE} has SHA-256 {file_sha256(part)}, not {FILES[name]}: it is not the published "
                    "file; nothing was kept of it"
                )
            part.replace(folder / name)
    return True


def _right(path: Path, sha: str) -> bool:
    return path.is_file() and file_sha256(path) == sha


def _download(scratch: Path) -> Path:
    """Root of the unpacked package."""
    by_hand = f"elsewhere, unpack its {', '.join(f'{name}.gz' for name in FILES)} into the folder"
    reachable = f"the registry must be reachable (apt-get update first), or {by_hand}"
    _run(["apt-get", "download", PACKAGE], scratch, reachable)
    packages = list(scratch.glob("*.deb"))
    if len(packages) != 1:
        raise MdpError(f"apt-get download {PACKAGE} left {len(packages)} packages where one was expected")
    _run(["dpkg", "-x", packages[0].name, "unpacked"], scratch, by_hand)
    return scratch / "unpacked"


def _run(command: list[str], folder: Path, remedy: str) -> None:
    what = " ".join(command)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except FileNotFoundError as error:
        raise MdpError(f"Fashion-MNIST: there is no {command[0]} here; {remedy}") from error
    except subprocess.TimeoutExpired as error:
        raise MdpError(f"Fashion-MNIST: {what} took longer than {TIMEOUT_S} s; {remedy}") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise MdpError(f"Fashion-MNIST: {what} failed with status {done.returncode} ({said}); {remedy}")
