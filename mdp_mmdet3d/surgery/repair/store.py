"""What a repair has finished, so that an interrupted one goes on and a finished one is read: a file per layer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdp_mmdet3d.errors import FileFormatError
from mdp_mmdet3d.files import digest, read_json, read_npz, write_json, write_npz
from mdp_mmdet3d.surgery.repair.settings import LayerRepair, RepairReport

SCHEMA_VERSION = 1
FINISHED_FILE = "finished.json"


class RepairStore:
    """A folder of finished layers. What is of another identity, or damaged, counts as not there.

    Args:
        folder: Made when the first layer is saved.
        identity: What the repaired weights depend on.
        writes: Whether this process saves; the others of a distributed run only read.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], writes: bool = True) -> None:
        self.folder, self.identity, self.writes = folder, digest(dict(identity)), writes
        if writes and folder.is_dir() and not any(self._load(path) for path in folder.glob("*.npz")):
            shutil.rmtree(folder)  # of another plan, other weights or other data

    def load(self, name: str) -> tuple[LayerRepair, dict[str, Tensor]] | None:
        """Result and changed tensors of a layer; None if it is not finished."""
        return self._load(self._path(name))

    def save(self, result: LayerRepair, tensors: Mapping[str, Tensor]) -> None:
        """Keep a finished layer: its result and the tensors that were changed."""
        if self.writes:
            arrays = {key: value.detach().to("cpu", torch.float32).numpy() for key, value in tensors.items()}
            meta = {"schema_version": SCHEMA_VERSION, "identity": self.identity, "result": result.to_dict()}
            write_npz(self._path(result.name), meta, arrays)

    def finish(self, report: RepairReport) -> None:
        """Note that all layers are there."""
        if self.writes:
            data = {"schema_version": SCHEMA_VERSION, "identity": self.identity, **report.to_dict()}
            write_json(self.folder / FINISHED_FILE, data)

    def apply(self, model: nn.Module) -> RepairReport | None:
        """Put the weights of a finished repair into a pruned model; None, and no change, if it did not finish."""
        path = self.folder / FINISHED_FILE
        if not path.exists():
            return None
        try:
            data = read_json(path, what="finished repair", schema_version=SCHEMA_VERSION)
            report = RepairReport.from_dict(data)
        except (FileFormatError, KeyError, TypeError):
            return None
        loaded = {layer.name: self.load(layer.name) for layer in report.refitted}
        if data.get("identity") != self.identity or not all(loaded.values()):
            return None
        for found in loaded.values():
            put(model, found[1] if found else {})
        return report

    def _load(self, path: Path) -> tuple[LayerRepair, dict[str, Tensor]] | None:
        if not path.exists():
            return None
        try:
            meta, arrays = read_npz(path, what="repaired layer", schema_version=SCHEMA_VERSION)
        except FileFormatError:
            return None
        if meta.get("identity") != self.identity:
            return None
        return LayerRepair.from_dict(meta["result"]), {key: torch.from_numpy(array) for key, array in arrays.items()}

    def _path(self, name: str) -> Path:
        return self.folder / f"{digest(name)}.npz"


def put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model the values of some of its tensors."""
    state = model.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor)
