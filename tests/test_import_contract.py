"""Arrows point one way: read from the import statements, nothing is imported."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mdp_mmdet3d"
NUMPY_ONLY = ("solver", "operators", "latency/table.py", "latency/interpolation.py", "latency/predict.py",
              "latency/sampling.py", "space/types.py", "surgery/plan.py", "importance/table.py",
              "importance/values.py")  # fmt: skip
HEAVY = ("torch", "onnx", "mmengine", "mmcv", "mmdet", "mmdet3d", "torch_pruning")


def imported(path: Path, *, top_level: bool = False) -> set[str]:
    """Modules that a file imports; only those of its top level where asked for."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def files() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def test_the_library_imports_no_detector():
    assert not [path for path in files() if any(name.split(".")[0] == "projects" for name in imported(path))]


def test_there_is_no_circle_between_folders():
    ties: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in files():
        parts = path.relative_to(ROOT / PACKAGE).parts
        for name in imported(path):
            target = name.split(".")
            if len(parts) > 1 and target[0] == PACKAGE and len(target) > 1 and (ROOT / PACKAGE / target[1]).is_dir():
                ties[parts[0], target[1]].append(f"{path.relative_to(ROOT)} -> {name}")
    graph = nx.DiGraph(edge for edge in ties if edge[0] != edge[1])
    assert graph.number_of_edges() > 15
    circles = [
        {f"{a} -> {b}": ties[a, b] for a, b in zip(circle, [*circle[1:], circle[0]])}
        for circle in nx.simple_cycles(graph)
    ]
    assert not circles


def test_plain_data_and_the_solver_need_neither_torch_nor_onnx():
    for place in NUMPY_ONLY:
        path = ROOT / PACKAGE / place
        for file in [path] if path.suffix else sorted(path.rglob("*.py")):
            heavy = {name.split(".")[0] for name in imported(file, top_level=True)} & set(HEAVY)
            assert not heavy, f"{file.relative_to(ROOT)} imports {heavy}"
