"""What a cache knows its data by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdp_mmdet3d.files import file_sha256


def data_identity(dataset: Mapping[str, Any]) -> str:
    """Identity of a data set's frames, the same wherever the data lie.

    Args:
        dataset: Config of the data set, or of a wrapper around it.

    Returns:
        ``"<info file>@<first 16 hex digits of its SHA-256>"``; the path where there is no file to read.
    """
    while "ann_file" not in dataset and isinstance(dataset.get("dataset"), Mapping):
        dataset = dataset["dataset"]
    location = f"{dataset.get('data_root') or ''}/{dataset.get('ann_file') or ''}"
    if "://" in location:
        return location
    # An absolute info file stands for itself, as in MMEngine's data sets.
    path = Path(dataset.get("data_root") or "", dataset.get("ann_file") or "").resolve()
    return f"{path.name}@{file_sha256(path)[:16]}" if path.is_file() else str(path)
