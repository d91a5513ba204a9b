"""What a cache knows its data by."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdp_mmdet3d.files import digest, file_sha256


def data_identity(dataset: Mapping[str, Any]) -> str:
    """Identity of a data set's frames, the same wherever the data lie.

    Args:
        dataset: Config of the data set, or of a wrapper around it.

    Returns:
        ``"<info file>@<first 16 hex digits of its SHA-256>"``, without an info file the same of the folder with names
        and sizes of its files; the path where there is nothing to read.
    """
    while "ann_file" not in dataset and isinstance(dataset.get("dataset"), Mapping):
        dataset = dataset["dataset"]
    location = f"{dataset.get('data_root') or ''}/{dataset.get('ann_file') or ''}"
    if "://" in location:
        return location
    # An absolute info file stands for itself, as in MMEngine's data sets.
    path = Path(dataset.get("data_root") or "", dataset.get("ann_file") or "").resolve()
    if path.is_file():
        return f"{path.name}@{file_sha256(path)[:16]}"
    if dataset.get("data_root") and not dataset.get("ann_file") and path.is_dir():
        part = [str(dataset.get(key) or "") for key in ("split", "data_prefix")]
        return f"{path.name}@{digest([*part, *_files(path)])}"
    return str(path)


def _files(folder: Path) -> list[str]:
    """Name and size of every file below a folder, sorted."""
    found: list[str] = []
    for place, _, names in os.walk(folder):
        found += [f"{(path := Path(place, name)).relative_to(folder)} {path.stat().st_size}" for name in names]
    return sorted(found)
