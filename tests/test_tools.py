"""What all command lines have in common."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mdp_mmdet3d.command_line import BAD_INPUT, STOPPED, command
from mdp_mmdet3d.errors import FileFormatError

TOOLS = sorted((Path(__file__).resolve().parents[1] / "tools").glob("*.py"))


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_a_bad_input_ends_in_status_2_and_a_stop_in_130(path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    if any(ast.unparse(decorator).startswith("command(stopped=") for decorator in main.decorator_list):
        return  # tested below
    status: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            ends = [ast.unparse(end.value) for end in node.body if isinstance(end, ast.Return) and end.value]
            for name in [item.id for item in ast.walk(node.type) if isinstance(item, ast.Name)]:
                status.setdefault(name, set()).update(ends)
    assert status.get("KeyboardInterrupt", set()) & {"130", "STOPPED"}
    assert status.get("MdpError", set()) & {"2", "BAD_INPUT"}


@pytest.mark.parametrize(
    "end, status, line",
    [
        (FileFormatError("plan.json is damaged"), BAD_INPUT, "error: plan.json is damaged\n"),
        (KeyboardInterrupt(), STOPPED, "stopped; nothing was written\n"),
    ],
)
def test_a_command_tells_what_ended_it(end, status, line, capsys) -> None:
    @command(stopped="nothing was written")
    def main() -> int:
        raise end

    assert main() == status
    assert capsys.readouterr() == ("", line)


def test_a_command_keeps_its_own_status_and_the_traceback_of_a_bug() -> None:
    @command(stopped="nothing was written")
    def missed() -> int:
        return 1

    @command(stopped="nothing was written")
    def broken() -> int:
        raise KeyError("layer1")

    assert missed() == 1
    with pytest.raises(KeyError, match="layer1"):
        broken()
