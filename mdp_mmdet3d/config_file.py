"""Reading a config file as the command-line tools do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.shipped import CONFIGS, PREFIX, config_path, shipped_name


def read_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config and apply ``--cfg-options``.

    Args:
        path: A file, or ``mdp_mmdet3d::streampetr_mdp.py`` for a config that comes with this package.
        options: Settings to override, e.g. ``{"prune.budget": 0.4}``.

    Raises:
        MdpError: The file does not exist.
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
    config = Config.fromfile(path)
    if options:
        config.merge_from_dict(options)
    return config


def check_keys(keys: Iterable[str], known: Sequence[str], section: str) -> None:
    """Raise `MdpError` if a section of a config has a key that is not ``known``; the message names the nearest."""
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise MdpError(f"unknown key {key!r} in the config's {section} section; {hint}")


def without_pretrained(config: Any) -> Any:
    """Copy of a model config without initialisation from checkpoint files."""
    if isinstance(config, Mapping):
        return {
            key: without_pretrained(value)
            for key, value in config.items()
            if not (key == "init_cfg" and isinstance(value, Mapping) and value.get("type") == "Pretrained")
            and not (key == "pretrained" and isinstance(value, str))
        }
    if isinstance(config, (list, tuple)):
        return type(config)(without_pretrained(value) for value in config)
    return config
