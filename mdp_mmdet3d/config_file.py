"""Reading a config file as the command-line tools do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.shipped import CONFIGS, PREFIX, config_path, shipped_name


def read_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config and apply ``--cfg-options``.

    Args:
        path: A file, or ``mdp_mmdet3d::streampetr_mdp.py`` for a config that comes with this package.
        options: Settings to override, e.g. ``{"prune.budget": 0.4}``.

    Raises:
        MdpError: The file does not exist, or it cannot be read or overridden so.
    """
    path = config_path(path)
    if not path.is_file():
        meant = shipped_name(path)
        raise MdpError(
            f"config {path} does not exist; "
            + (
                f"is {meant} meant, which comes with this package?"
                if meant
                else f"the main one is {PREFIX}streampetr_mdp.py, those for training are {PREFIX}streampetr/*e.py "
                f"(in {CONFIGS.resolve()})"
            )
        )
    try:
        config = Config.fromfile(path)
    except MdpError:
        raise
    except Exception as error:  # a config is a program: it may raise anything
        raise MdpError(f"config {path} cannot be read: {type(error).__name__}: {error}") from error
    if options:
        try:
            config.merge_from_dict(dict(options))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise MdpError(f"--cfg-options do not fit {path}: {type(error).__name__}: {error}") from error
    return config


def default_work_dir(config: str | Path, step: str) -> Path:
    """Where a tool writes if it is not told.

    Args:
        config: What the tool was given.
        step: Of the tool; names the folder beside the config of a pruned model, which is called alike for every model.

    Returns:
        ``work_dirs/<name of the config>``, or ``step`` beside a ``plan.json``.
    """
    path = Path(config)
    if (path.parent / "plan.json").is_file():
        return path.parent / step
    return Path("work_dirs") / path.stem


def without_pretrained(config: Any) -> Any:
    """Copy of a model config without initialisation from checkpoint files; a `ConfigDict` keeps its attributes."""
    if isinstance(config, Mapping):
        kept = {
            key: without_pretrained(value)
            for key, value in config.items()
            if not (key == "init_cfg" and isinstance(value, Mapping) and value.get("type") == "Pretrained")
            and not (key == "pretrained" and isinstance(value, str))
        }
        return ConfigDict(kept) if isinstance(config, ConfigDict) else kept
    if isinstance(config, (list, tuple)):
        return type(config)(without_pretrained(value) for value in config)
    return config
