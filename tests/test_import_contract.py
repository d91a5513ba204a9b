"""Arrows point one way: read from the import statements, nothing is imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mdp_mmdet3d"
NUMPY_ONLY = ("sums.py", "solver", "operators", "latency/table.py", "latency/interpolation.py", "latency/predict.py",
              "latency/sampling.py", "space/types.py", "surgery/plan.py", "importance/table.py",
              "importance/values.py")  # fmt: skip
HEAVY = ("torch", "onnx", "mmengine", "mmcv", "mmdet", "mmdet3d", "torch_pruning")

_spec = importlib.util.spec_from_file_location("import_graph", ROOT / "benchmarks/import_graph.py")
graph = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(graph)


def test_the_library_imports_no_detector():
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    assert not [path for path in files if any(name.split(".")[0] == "projects" for name in graph.imported(path))]


def test_projects_is_a_namespace():
    """An __init__.py there would hide the projects of an MMDetection3D checkout, or be hidden by theirs."""
    assert (ROOT / "projects/streampetr/__init__.py").is_file() and not (ROOT / "projects/__init__.py").exists()


def test_there_is_no_circle_between_folders():
    edges = graph.ties(ROOT)
    assert len(edges) > 15 and any(here == "projects/streampetr" for here, _ in edges)
    found = [{pair: edges[pair] for pair in zip(circle, [*circle[1:], circle[0]])} for circle in graph.circles(edges)]
    assert not found


def test_a_circle_would_be_found(tmp_path):
    for name, text in (
        ("mdp_mmdet3d/a/x.py", "from mdp_mmdet3d import b\n"),
        ("mdp_mmdet3d/b/x.py", "def f():\n    import projects.c.x\n"),
        ("projects/c/x.py", "from mdp_mmdet3d.a.x import y\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    assert sorted(graph.circles(graph.ties(tmp_path))[0]) == ["mdp_mmdet3d/a", "mdp_mmdet3d/b", "projects/c"]


def test_plain_data_and_the_solver_need_neither_torch_nor_onnx():
    for place in NUMPY_ONLY:
        path = ROOT / PACKAGE / place
        for file in [path] if path.suffix else sorted(path.rglob("*.py")):
            heavy = {name.split(".")[0] for name in graph.imported(file, top_level=True)} & set(HEAVY)
            assert not heavy, f"{file.relative_to(ROOT)} imports {heavy}"
