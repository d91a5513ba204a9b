"""Fetching Fashion-MNIST: what is right stays, what is wrong or cannot be had is one clear error."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import pytest

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.simdata import fashion_mnist

CONTENT = {name: name.encode() * 3 for name in fashion_mnist.FILES}


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Stand-ins for ``apt-get`` and ``dpkg`` that hand out packed files; returns the folder that they come from."""
    source, programs = tmp_path / "source", tmp_path / "bin"
    source.mkdir()
    programs.mkdir()
    for name, content in CONTENT.items():
        (source / f"{name}.gz").write_bytes(gzip.compress(content))
    _program(programs / "apt-get", "touch dataset.deb")
    _program(programs / "dpkg", f"mkdir -p $3/{fashion_mnist.WHERE} && cp {source}/* $3/{fashion_mnist.WHERE}/")
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(
        fashion_mnist, "FILES", {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    )
    monkeypatch.setattr(fashion_mnist, "INSTALLED", tmp_path / "not installed")
    return source


def _program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def test_fetched_once_and_mended_where_a_file_is_damaged(registry, tmp_path):
    out = tmp_path / "cache" / "fashion"
    assert fashion_mnist.fetch_fashion_mnist(out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == CONTENT
    assert not fashion_mnist.fetch_fashion_mnist(out)
    damaged = out / "t10k-labels-idx1-ubyte"
    damaged.write_bytes(b"half")
    assert fashion_mnist.fetch_fashion_mnist(out)
    assert damaged.read_bytes() == CONTENT[damaged.name]


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda source, programs: (source / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"x")), "SHA-256"),
        (lambda source, programs: (source / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip"), "cannot be read"),
        (lambda source, programs: _program(programs / "apt-get", "echo 'E: no route' >&2; exit 100"), "E: no route"),
        (lambda source, programs: _program(programs / "apt-get", "true"), "0 packages"),
    ],
)
def test_what_cannot_be_had_is_said_and_not_kept(registry, tmp_path, break_it, says):
    break_it(registry, tmp_path / "bin")
    out = tmp_path / "fashion"
    with pytest.raises(MdpError, match=says):
        fashion_mnist.fetch_fashion_mnist(out)
    for path in out.iterdir():
        assert path.read_bytes() == CONTENT[path.name]  # files that were right before the error


def test_no_apt(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MdpError, match=r"no apt-get here; the registry must be reachable.*train-images-idx3-ubyte\.gz"):
        fashion_mnist.fetch_fashion_mnist(tmp_path / "fashion")
    (tmp_path / "file").touch()
    with pytest.raises(MdpError, match="is a file"):
        fashion_mnist.fetch_fashion_mnist(tmp_path / "file")
