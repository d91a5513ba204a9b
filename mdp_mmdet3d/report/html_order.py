"""Where a module's layers run, as the exported graphs tell: what runs after a module's children is drawn after them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, TypeVar

DENSE_GRAPHS = Path("onnx") / "dense"


class Located(Protocol):
    """What is drawn at a module path."""

    @property
    def path(self) -> str:
        """Module path, e.g. ``pts_bbox_head.cls_branches``."""


T = TypeVar("T", bound=Located)


def first_uses(work_dir: Path, engine: str) -> dict[str, int]:
    """Position of the first node that reads each parameter, in the dense graph of an engine.

    Args:
        work_dir: Work directory of a run.
        engine: E.g. ``head``.

    Returns:
        By parameter name; empty where there is no readable graph. The exporter folds some parameters into others
        (batch norm into convolutions, the packed weights of attention): those are not listed.
    """
    path = work_dir / DENSE_GRAPHS / f"{engine}.onnx"
    if not path.is_file():
        return {}
    try:
        import onnx

        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception:  # no onnx here, or no ONNX file: the order of space.json is drawn then
        return {}
    parameters = {tensor.name for tensor in graph.initializer}
    found: dict[str, int] = {}
    for position, node in enumerate(graph.node):
        for name in node.input:
            if name in parameters:
                found.setdefault(name, position)
    return found


def span(uses: dict[str, int], path: str) -> tuple[int, int] | None:
    """First and last position of what lies at or below a module path; None if the graph names nothing there."""
    found = [position for name, position in uses.items() if name.startswith(f"{path}.")]
    return (min(found), max(found)) if found else None


def runs_after(uses: dict[str, int], cards: list[T], children: list[str]) -> list[T]:
    """Those ``cards`` of a module whose first use comes after the last of its ``children``."""
    ends = [found[1] for child in children if (found := span(uses, child)) is not None]
    if not ends:
        return []
    later = []
    for card in cards:
        found = span(uses, card.path)
        if found is not None and found[0] > max(ends):
            later.append(card)
    return later
