"""Progress of long work where no terminal shows a bar: a plain line now and then."""

from __future__ import annotations

import time

from mdp_mmdet3d.extras import needs

with needs("latency", "showing progress"):
    from rich.console import Console
    from rich.progress import Progress

INTERVAL_S = 10.0


def step_bar(console: Console) -> Progress:
    """A bar that goes when its step ends; none without a terminal, where it would leave blank lines."""
    return Progress(console=console, transient=True, disable=not console.is_terminal)


class PlainProgress:
    """Prints ``title: done of total`` every `INTERVAL_S` unless the console is a terminal.

    Args:
        console: Where to print.
        title: What is being done.
        total: How much there is.
        unit: What is counted.
        done: How much was done before; it does not count for the remaining time.
    """

    def __init__(self, console: Console, title: str, total: int, unit: str, done: int = 0) -> None:
        self._console, self._title, self._total, self._unit, self._before = console, title, total, unit, done
        self._start = self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        """Say that ``done`` is done, if it is time to."""
        now = time.monotonic()
        if self._console.is_terminal or now - self._said < INTERVAL_S:
            return
        self._said = now
        left = (now - self._start) / max(done - self._before, 1) * (self._total - done)
        self._console.print(
            f"  {self._title}: {done} of {self._total} {self._unit}, about {left:.0f} s left", highlight=False
        )
