"""tools/pareto.py: figures and picture of one front, or the earlier ones."""

from __future__ import annotations

import errno
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "pareto.py"


@pytest.fixture
def tool(random_problem, tmp_path) -> ModuleType:
    """The tool, and a problem for it."""
    spec = importlib.util.spec_from_file_location("pareto_tool", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    random_problem(6).save(tmp_path / "problem.npz")
    return tool


def test_without_matplotlib_the_front_is_written(tool, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["pareto.py", str(tmp_path), "--points", "3"])
    assert tool.main() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pareto.json", "problem.npz"]
    out, err = capsys.readouterr()
    assert f"wrote pareto.json to {tmp_path}" in out and "'matplotlib', which is not installed here" in err


def test_front_and_picture_are_written_both_or_neither(tool, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["pareto.py", str(tmp_path), "--points", "5"])
    assert tool.main() == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["pareto.json", "pareto.png", "problem.npz"]

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tool, "plot_front", full)
    monkeypatch.setattr(sys, "argv", ["pareto.py", str(tmp_path), "--points", "3"])
    assert tool.main() == 2
    assert f"cannot write {tmp_path}: No space left on device" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
