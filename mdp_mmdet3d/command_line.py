"""How a command line ends: its exit status and, where something went wrong, one line that says what."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from mdp_mmdet3d.errors import MdpError

BAD_INPUT = 2
STOPPED = 130  # as a shell has it for a program that Ctrl-C ended


def command(stopped: str) -> Callable[[Callable[[], int]], Callable[[], int]]:
    """Decorator of the ``main`` of a tool.

    What a user can mend (`MdpError`) becomes a line on stderr and `BAD_INPUT`, Ctrl-C a line on stderr and `STOPPED`;
    any other error is a bug of ours and keeps its traceback.

    Args:
        stopped: What a user who stopped the tool should know: what was written, or how to go on.
    """

    def decorate(main: Callable[[], int]) -> Callable[[], int]:
        @functools.wraps(main)
        def run() -> int:
            try:
                return main()
            except MdpError as error:
                print(f"error: {error}", file=sys.stderr)
                return BAD_INPUT
            except KeyboardInterrupt:
                print(f"stopped; {stopped}", file=sys.stderr)
                return STOPPED

        return run

    return decorate
