"""Cases of `benchmarks/bad_input.py`, by what is fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import checkpoints, data, folders, runtime, settings
from .case import Assets, Case, make_assets

GROUPS: dict[str, Callable[[Assets], Iterator[Case]]] = {
    "frame": runtime.frames,
    "camera frame": runtime.camera_frames,
    "manifest": runtime.manifests,
    "drive": runtime.drives,
    "image": runtime.images,
    "validate_fps": runtime.validations,
    "info file": data.info_files,
    "metric and submission": data.submissions,
    "data identity": data.identities,
    "checkpoint": checkpoints.files,
    "foreign checkpoint": checkpoints.foreign,
    "setting": settings.sections,
    "budget": settings.budgets,
    "config": settings.configs,
    "target": settings.targets,
    "folder": folders.targets,
    "tool": folders.tools,
}

__all__ = ["GROUPS", "Assets", "Case", "make_assets"]
