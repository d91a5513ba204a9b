"""Reading a config file as the command-line tools do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mdp_mmdet3d.errors import MdpError


def read_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config and apply ``--cfg-options``.

    Raises:
        MdpError: The file does not exist, or it cannot be read or overridden so.
    """
    if not Path(path).is_file():
        raise MdpError(
            f"config {path} does not exist; the main one is configs/streampetr_mdp.py, those for "
            "training are in configs/streampetr/"
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
    """Where a tool writes if it is not told: ``work_dirs/<name of the config>``; for a pruned model's config, which has
    the same name for every model, a folder named after ``step`` beside it."""
    path = Path(config)
    if (path.parent / "plan.json").is_file():
        return path.parent / step
    return Path("work_dirs") / path.stem


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
