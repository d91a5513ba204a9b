"""One run at a time in a work directory."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import write_error

LOCK_FILE = ".lock"
F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def work_dir_lock(folder: str | Path) -> Iterator[None]:
    """Hold a work directory for the block; the system lets go of it when the process ends, however it does.

    Raises:
        MdpError: Another run holds it; names process and machine.
        WriteError: The folder cannot be written.
    """
    path = Path(folder) / LOCK_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise write_error(path, error) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            raise MdpError(
                f"{folder} is in use by another run ({stream.read().strip() or 'unknown'}): two would mix their files. "
                "Wait for it, stop it, or give another --work-dir"
            ) from error
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        stream.flush()
        yield


def locks_work_dir(method: F) -> F:
    """Method decorator: hold ``self.work_dir`` while it runs."""

    @wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with work_dir_lock(self.work_dir):
            return method(self, *args, **kwargs)

    return locked  # type: ignore[return-value]
