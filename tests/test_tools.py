"""What all command lines have in common."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TOOLS = sorted((Path(__file__).resolve().parents[1] / "tools").glob("*.py"))


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_a_bad_input_ends_in_status_2_and_a_stop_in_130(path) -> None:
    status: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            ends = [ast.unparse(end.value) for end in node.body if isinstance(end, ast.Return) and end.value]
            for name in [item.id for item in ast.walk(node.type) if isinstance(item, ast.Name)]:
                status.setdefault(name, set()).update(ends)
    assert status.get("KeyboardInterrupt", set()) & {"130", "STOPPED"}
    assert status.get("MdpError", set()) & {"2", "BAD_INPUT"}
