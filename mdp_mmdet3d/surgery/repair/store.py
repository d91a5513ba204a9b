"""Layers that an interrupted repair has finished, one file each."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdp_mmdet3d.errors import FileFormatError
from mdp_mmdet3d.files import digest, read_npz, write_npz
from mdp_mmdet3d.surgery.repair.settings import LayerRepair

SCHEMA_VERSION = 1


class RepairStore:
    """A folder of finished layers; what is of another identity is ignored and goes.

    Args:
        folder: Made when the first layer is saved.
        identity: What repaired weights depend on.
        writes: Whether this process saves; the others of a distributed run only read.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], writes: bool = True) -> None:
        self.folder, self.identity, self.writes = folder, digest(dict(identity)), writes

    def load(self, name: str) -> tuple[LayerRepair, dict[str, Tensor]] | None:
        """Result and changed tensors of a layer; None if it is not finished, or not readable."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            meta, arrays = read_npz(path, what="repaired layer", schema_version=SCHEMA_VERSION)
        except FileFormatError:
            return None
        if meta.get("identity") != self.identity:
            return None
        return LayerRepair.from_dict(meta["result"]), {key: torch.from_numpy(array) for key, array in arrays.items()}

    def save(self, result: LayerRepair, tensors: Mapping[str, Tensor]) -> None:
        """Keep a finished layer: its result and the tensors that were changed."""
        if self.writes:
            arrays = {key: _array(value) for key, value in tensors.items()}
            meta = {"schema_version": SCHEMA_VERSION, "identity": self.identity, "result": result.to_dict()}
            write_npz(self._path(result.name), meta, arrays)

    def clear(self) -> None:
        """Remove all of it."""
        if self.writes:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{digest(name)}.npz"


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float32).numpy()
