"""How a run came about: command, settings, versions."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mdp_mmdet3d import __version__
from mdp_mmdet3d.device import processor_name, system_name

DEFAULT_TOLERANCE = 0.02  # of `prune.tolerance`, and of reports that do not say theirs
PACKAGES = (
    "torch",
    "mmengine",
    "mmcv",
    "mmdet",
    "mmdet3d",
    "onnx",
    "onnxruntime",
    "pyscipopt",
    "torch-pruning",
    "numpy",
)


def provenance(
    command: str,
    config: str | None,
    checkpoint: str | None,
    settings: Mapping[str, Any],
    *,
    finished: float | None = None,
) -> dict[str, Any]:
    """What it takes to do a run again, as JSON data.

    Args:
        command: Command line that started it; empty where a program did.
        config: Path of the config, if it came from a file.
        checkpoint: Dense weights as given; None for random ones.
        settings: The ``prune`` section as it was used.
    """
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "command": command,
        "folder": str(Path.cwd()),
        "config": config,
        "checkpoint": checkpoint,
        "settings": dict(settings),
        "finished": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": processor_name(),
        "system": system_name(),
        "versions": {"mdp_mmdet3d": __version__, "python": platform.python_version(), **packages},
    }
