"""What the end of a block stands for where the blocks behind it are removed: the end of the last of them."""

from __future__ import annotations

from collections.abc import Collection


def run_ends(modules: Collection[str], removed: Collection[str]) -> dict[str, str]:
    """Kept blocks behind which blocks of the same list are removed, with the last of those.

    What reads such a block expects what the removed ones made of it. Blocks of one list are modules ``stem.0``,
    ``stem.1``, ... of which at least one is removed as a whole.

    Args:
        modules: Names of the dense model's modules.
        removed: Names of removed blocks.
    """
    stems = {stem for stem, _, number in (name.rpartition(".") for name in removed) if stem and number.isdigit()}
    found = {}
    for stem in stems:
        numbers = sorted(
            int(number) for s, _, number in (name.rpartition(".") for name in modules) if s == stem and number.isdigit()
        )
        kept = None
        for number in numbers:
            name = f"{stem}.{number}"
            if name not in removed:
                kept = name
            elif kept is not None:
                found[kept] = name
    return found
