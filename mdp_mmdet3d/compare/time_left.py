"""How long work of several kinds will still take, from what each kind took so far."""

from __future__ import annotations

from collections import Counter, defaultdict


class TimeLeft:
    """Counts what is to be done and what is done, by kind."""

    def __init__(self) -> None:
        self.waiting: Counter[str] = Counter()
        self._took: defaultdict[str, list[float]] = defaultdict(list)

    @property
    def ended(self) -> int:
        """Pieces of work that have ended."""
        return sum(map(len, self._took.values()))

    @property
    def total(self) -> int:
        """Pieces of work in all."""
        return self.ended + sum(self.waiting.values())

    def add(self, kind: str) -> None:
        """There is one more to do."""
        self.waiting[kind] += 1

    def end(self, kind: str, seconds: float) -> None:
        """One has ended after ``seconds``."""
        self.waiting[kind] -= 1
        self._took[kind].append(seconds)

    def sentence(self, workers: int = 1) -> str:
        """``", about 3 min left"``; of a kind that has not ended once, only how many there are. Empty at the end."""
        known = [(kind, count) for kind, count in self.waiting.items() if count and self._took[kind]]
        seconds = sum(count * sum(self._took[kind]) / len(self._took[kind]) for kind, count in known) / workers
        unknown = [f"{count} x {kind}" for kind, count in self.waiting.items() if count and not self._took[kind]]
        parts = []
        if known:
            parts.append(f"about {seconds:.0f} s left" if seconds < 120 else f"about {seconds / 60:.0f} min left")
        if unknown:
            parts.append(f"{' and '.join(unknown)} not timed yet")
        return "".join(f", {part}" for part in parts)
