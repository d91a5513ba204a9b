"""Configs that come with the package, by name from any folder."""

from __future__ import annotations

from pathlib import Path

PREFIX = "mdp_mmdet3d::"
CONFIGS = Path(__file__).with_name(".mim") / "configs"  # where OpenMMLab's packages keep theirs; a link in a checkout


def config_path(name: str | Path) -> Path:
    """The file behind ``mdp_mmdet3d::streampetr_mdp.py``; any other name is a path already."""
    text = str(name)
    return (CONFIGS / text.removeprefix(PREFIX)).resolve() if text.startswith(PREFIX) else Path(text)


def shipped_name(path: Path) -> str | None:
    """The name of the shipped config that somebody may mean who writes ``configs/...`` outside of a checkout."""
    inner = Path(*path.parts[path.parts.index("configs") + 1 :]) if "configs" in path.parts else path
    return PREFIX + inner.as_posix() if (CONFIGS / inner).is_file() else None
