"""Reading a checkpoint file without running code from it, and saying what it is where it is none."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from mdp_mmdet3d.checkpoint.check import meta_of
from mdp_mmdet3d.checkpoint.safe_loading import register_safe_globals
from mdp_mmdet3d.checkpoint.weights import find_weights
from mdp_mmdet3d.errors import FileFormatError

register_safe_globals()
logger = logging.getLogger(__name__)

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_GLOBAL = re.compile(r"(?:GLOBAL|class)\s+[`']?([\w.]+\.\w+)")
_SHOWN = 5


def read_checkpoint(
    path: str | Path, own: Collection[str] = (), *, averaged: bool = False, trust: bool = False
) -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Args:
        path: A file of ``torch.save``: a mapping with the weights under one of the usual names, or a bare state dict.
        own: Names of the model's tensors, where it is known: what stands before them in the file is taken off.
        averaged: Take the averaged (EMA) weights of a file that has both.
        trust: Run what a pickle asks for. Only for files of a maker whom you trust.

    Returns:
        A mapping with at least ``state_dict`` (without wrapper prefixes) and ``meta``, which is empty (with a warning)
        where the file's is no dictionary.

    Raises:
        FileFormatError: The file is missing, truncated, needs code to load, or holds no weights or none that are
            finite.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=not trust)
    except FileNotFoundError as error:
        raise FileFormatError(f"checkpoint {path} does not exist") from error
    except pickle.UnpicklingError as error:
        raise FileFormatError(_refused(path, error)) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, ImportError, TypeError) as error:
        if (kind := _no_checkpoint(path)) is not None:
            raise FileFormatError(f"{path} {kind}") from error
        raise FileFormatError(f"{path} is truncated or no checkpoint ({_first_line(error)})") from error
    if not isinstance(data, Mapping):
        raise FileFormatError(f"checkpoint {path} holds a {type(data).__name__} instead of a state dict")
    found = find_weights(data, f"checkpoint {path}", own, averaged)
    for note in found.notes:
        logger.info("checkpoint %s: %s", path, note)
    return {**data, "state_dict": found.state, "meta": meta_of(data, f"checkpoint {path}")}


def _refused(path: str | Path, error: pickle.UnpicklingError) -> str:
    """Why a file that torch does not load safely is refused."""
    if (kind := _no_checkpoint(path)) is not None:
        return f"{path} {kind}"
    types = _foreign_types(path, str(error))
    if not types:
        return f"{path} is corrupt or holds more than tensors and plain values ({_first_line(error)})"
    more = f" and {len(types) - _SHOWN} more" if len(types) > _SHOWN else ""
    return (
        f"{path} is corrupt or holds more than tensors and plain values: {', '.join(types[:_SHOWN])}{more}. Loading "
        "these runs code from the file. If you trust its maker, write a copy without them: python "
        f"tools/convert_checkpoint.py {path} COPY.pth --trust"
    )


def _foreign_types(path: str | Path, message: str) -> list[str]:
    """Types that a pickle names and that are not known to be harmless."""
    try:
        types = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # torch before 2.6, the old file format, a damaged pickle: the message names the first one
        types = []
    if not types:
        found = _GLOBAL.search(_ESCAPES.sub("", message))
        types = [found[1]] if found else []
    return types


def _no_checkpoint(path: str | Path) -> str | None:
    """What a file is that is often taken for a checkpoint."""
    try:
        with Path(path).open("rb") as stream:
            head = stream.read(512).lstrip()
    except OSError:
        return None
    if not head:
        return "is empty; download or copy it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself: run `git lfs pull` where it came from"
    if head[:1] == b"<" and (b"<html" in head.lower() or b"<!doctype" in head.lower()):
        return "is a web page, not a checkpoint: the download asked for something (a login, a consent): use a browser"
    return None


def _first_line(error: BaseException) -> str:
    text = _ESCAPES.sub("", str(error)).strip().split("\n")[0]
    return text or type(error).__name__
