"""Sections of a config, read into dataclasses: pydantic checks the values, its errors become one `MdpError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import Field, StrictBool, StrictStr, TypeAdapter, ValidationError

from mdp_mmdet3d.errors import MdpError

# Types of settings. Nothing is converted, but a list is taken for a tuple and a whole number for a number.
Count = Annotated[int, Field(strict=True, ge=1)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0)]
Text = StrictStr
Flag = StrictBool

WORDS = {
    "Input should": "must",
    "a valid boolean": "True or False",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid tuple": "a list",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}
"""Ours for pydantic's."""

Settings = TypeVar("Settings")


def read_section(kind: type[Settings], section: Mapping[str, Any], name: str) -> Settings:
    """Read a section of a config.

    Args:
        kind: Dataclass whose annotations say what is right; ``examples`` of a pydantic ``Field`` are told in errors.
        section: Its values; what is missing has the default.
        name: Of the section in a config, e.g. ``"prune.finetune"``.

    Raises:
        MdpError: The section is no dict, has an unknown key (the nearest is named), lacks one, or has bad values: all
            of them are named.
    """
    if not isinstance(section, Mapping):
        raise MdpError(f"{name} = {section!r} must be a dict of settings")
    check_keys(section, [field.name for field in fields(kind)], name)  # type: ignore[arg-type]
    try:
        return TypeAdapter(kind).validate_python(dict(section))
    except ValidationError as error:
        found = [_told(kind, name, item) for item in error.errors(include_url=False)]
        raise MdpError("; ".join(found)) from None


def check_keys(keys: Iterable[str], known: Sequence[str], section: str) -> None:
    """Raise `MdpError` if a section of a config has a key that is not ``known``; the message names the nearest."""
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise MdpError(f"unknown key {key!r} in the config's {section} section; {hint}")


def _told(kind: type, section: str, error: Mapping[str, Any]) -> str:
    """An error of pydantic in one line: where, the value, what it must be, an example."""
    field = str(error["loc"][0])
    where = section + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in error["loc"])
    metadata = getattr(get_type_hints(kind, include_extras=True)[field], "__metadata__", ())
    examples = [example for item in metadata for example in getattr(item, "examples", None) or ()]
    example = f", e.g. {field}={examples[0]}" if examples else ""
    if error["type"] == "missing":
        return f"{where} is missing in {error['input']!r}{example}"
    message = error["msg"]
    for theirs, ours in WORDS.items():
        message = message.replace(theirs, ours)
    return f"{where} = {error['input']!r} {message}{example}"
