"""Reading a config file as the command-line tools do."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mdp_mmdet3d.errors import MdpError


def read_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config and apply ``--cfg-options``.

    Raises:
        MdpError: The file does not exist.
    """
    if not Path(path).is_file():
        raise MdpError(f"config {path} does not exist; the main one is configs/streampetr_mdp.py, those for "
                       "training are in configs/streampetr/")
    config = Config.fromfile(path)
    if options:
        config.merge_from_dict(options)
    return config
