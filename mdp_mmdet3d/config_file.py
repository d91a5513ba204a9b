"""Reading a config file as the command-line tools do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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


def check_keys(keys: Iterable[str], known: Sequence[str], section: str) -> None:
    """Raise `MdpError` if a section of a config has a key that is not ``known``; the message names the nearest."""
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise MdpError(f"unknown key {key!r} in the config's {section} section; {hint}")


def check_types(settings: Any, section: str) -> None:
    """Raise `MdpError` if a value of a settings dataclass is not of its declared type."""
    for name, declared in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if not _is_a(value, declared):
            raise MdpError(f"{section}.{name} = {value!r} must be {_described(declared)}")


def _is_a(value: Any, declared: Any) -> bool:
    kind, arguments = get_origin(declared), get_args(declared)
    if kind in (Union, UnionType):
        return any(_is_a(value, item) for item in arguments)
    if kind is Literal:
        return value in arguments
    if kind is tuple:
        whole = arguments if arguments[-1] is not Ellipsis else arguments[:1] * len(value if value else ())
        return isinstance(value, tuple) and len(value) == len(whole) and all(map(_is_a, value, whole))
    if declared is Any:
        return True
    if isinstance(value, bool):
        return declared is bool
    if declared is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, kind or declared)


def _described(declared: Any) -> str:
    kind, arguments = get_origin(declared), get_args(declared)
    if kind in (Union, UnionType):
        return " or ".join(map(_described, arguments))
    if kind is Literal:
        return " or ".join(map(repr, arguments))
    if kind is tuple:
        count = "" if arguments[-1] is Ellipsis else f", {len(arguments)} items"
        return f"a list ({_described(arguments[0])} each{count})"
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}
    return names.get(declared, "a dict" if kind is not None else getattr(declared, "__name__", str(declared)))


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
