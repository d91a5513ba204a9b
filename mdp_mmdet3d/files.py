"""Reading and writing small files: atomic, versioned, without pickle."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mdp_mmdet3d.errors import FileFormatError, WriteError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (*_FULL, errno.EROFS, errno.EFBIG)  # only ever the answer to a write


def check_target_file(path: str | Path) -> None:
    """Raise `WriteError` now where writing ``path`` would fail later: for files that a long run writes at its end."""
    path = Path(path)
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or pipe"
        raise WriteError(f"cannot write {path}: it is {kind}, not a file; give another path")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise WriteError(f"cannot write {path}: {folder} is a file, not a folder; give a folder that can be written to")
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise write_error(path, OSError(errno.EROFS, os.strerror(errno.EROFS)))
    if not os.access(folder, os.W_OK):
        raise WriteError(f"cannot write {path}: no permission in {folder}; give a folder that can be written to")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the disk's refusal of a write in the block, such as "no space left", into a `WriteError` about ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        raise write_error(path, error) from error


def write_error(path: str | Path, error: OSError) -> WriteError:
    """What to tell the user when ``error`` kept ``path`` from being written."""
    remedy = "make room on that disk" if error.errno in _FULL else "give a folder that can be written to"
    return WriteError(f"cannot write {path}: {error.strerror or error}; {remedy} and run again")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder that replaces ``path`` only if the block succeeds.

    Raises:
        WriteError: The folder or the file cannot be written, or ``path`` is a device, a pipe or a folder.
    """
    check_target_file(path)
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    except OSError as error:
        raise write_error(target, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        with writing(target):
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, data: Any) -> None:
    """Write ``data`` as indented JSON, atomically. NaN and infinity are refused."""
    text = json.dumps(data, indent=1, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path, *, what: str, schema_version: int) -> dict[str, Any]:
    """Read a versioned JSON object.

    Args:
        path: File to read.
        what: Name of the noun for error messages, e.g. ``"pruning plan"``.
        schema_version: The only version that is understood.

    Raises:
        FileFormatError: The file is missing, is not JSON, is no object or has another version.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileFormatError(f"{what} {path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise FileFormatError(f"{what} {path} is truncated or not JSON ({error}); delete it and run again") from error
    check_version(data, path, what=what, schema_version=schema_version)
    return data


def check_version(data: Any, path: str | Path, *, what: str, schema_version: int | tuple[int, ...]) -> None:
    """Raise `FileFormatError` unless ``data`` is an object with the given ``schema_version`` or one of them."""
    known = (schema_version,) if isinstance(schema_version, int) else schema_version
    if not isinstance(data, dict) or "schema_version" not in data:
        raise FileFormatError(f"{path} is not a {what}: it has no schema_version")
    if data["schema_version"] not in known:
        raise FileFormatError(
            f"{what} {path} has schema_version {data['schema_version']!r}, this release reads "
            f"{', '.join(map(str, known))}; "
            "make it again with this release"
        )


def write_npz(path: str | Path, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays and a JSON ``meta`` entry as compressed npz, atomically."""
    content = io.BytesIO()  # zip writers that meet a full disk half-way hide its error behind one of their own
    np.savez_compressed(content, meta=np.array(json.dumps(meta)), **arrays)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def read_arrays(path: str | Path, *, what: str, remedy: str = "delete it and run again") -> dict[str, np.ndarray]:
    """All arrays of an npz file; raises `FileFormatError` where it is missing, damaged or none."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise FileFormatError(f"{what} {path} does not exist") from error
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        RuntimeError,
        SyntaxError,
        TypeError,  # a single array
        zipfile.BadZipFile,
        zlib.error,
        tokenize.TokenError,
    ) as error:
        raise _damaged(what, path, error, remedy) from error


def read_npz(
    path: str | Path, *, what: str, schema_version: int | tuple[int, ...]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what `write_npz` wrote; raises `FileFormatError` as `read_json` does."""
    arrays = read_arrays(path, what=what)
    try:
        meta = json.loads(str(arrays.pop("meta")))
    except (KeyError, ValueError) as error:
        raise _damaged(what, path, error, "delete it and run again") from error
    check_version(meta, path, what=what, schema_version=schema_version)
    return meta, arrays


def _damaged(what: str, path: str | Path, error: Exception, remedy: str) -> FileFormatError:
    return FileFormatError(f"{what} {path} is truncated or corrupt ({error}); {remedy}")


def digest(data: Any) -> str:
    """Short SHA-256 (16 hex digits) of the canonical JSON form of ``data``."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    state = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()
