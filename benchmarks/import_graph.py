"""Who imports whom: edges between folders, circles, files and lines per folder, the longest files.

    python benchmarks/import_graph.py [CHECKOUT]

Read from the import statements; nothing is imported. `tests/test_import_contract.py` uses the same functions.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter, defaultdict
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mdp_mmdet3d"
PROJECTS = "projects"


def imported(path: Path, *, top_level: bool = False) -> set[str]:
    """Modules that a file imports by their full names; only those of its top level where asked for."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module in (PACKAGE, PROJECTS)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def python_files(root: Path) -> list[Path]:
    """Sources of the library and of the projects, relative to ``root``."""
    return sorted(path.relative_to(root) for top in (PACKAGE, PROJECTS) for path in (root / top).rglob("*.py"))


def folder_of(root: Path, module: str) -> str | None:
    """``mdp_mmdet3d/solver`` for a module in it; None for files at the top of the library and for other packages."""
    top, _, rest = module.partition(".")
    inner = rest.split(".")[0]
    return f"{top}/{inner}" if top in (PACKAGE, PROJECTS) and inner and (root / top / inner).is_dir() else None


def ties(root: Path) -> dict[tuple[str, str], set[str]]:
    """Per pair of folders (importing, imported) the statements behind it, ``file -> module``."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for path in python_files(root):
        here = folder_of(root, ".".join(path.with_suffix("").parts))
        for name in imported(root / path):
            there = folder_of(root, name)
            if here and there and here != there:
                found[here, there].add(f"{path} -> {name}")
    return found


def circles(edges: dict[tuple[str, str], set[str]]) -> list[list[str]]:
    """Every simple circle of folders, shortest first."""
    return sorted(nx.simple_cycles(nx.DiGraph(list(edges))), key=lambda circle: (len(circle), circle))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", default=ROOT, help="default: the one this file lies in")
    root = parser.parse_args().checkout
    files, lines = Counter[str](), Counter[str]()
    length = {path: len((root / path).read_text(encoding="utf-8").splitlines()) for path in python_files(root)}
    for path, count in length.items():
        folder = folder_of(root, ".".join(path.with_suffix("").parts)) or f"{path.parts[0]} (top)"
        files[folder] += 1
        lines[folder] += count
    edges = ties(root)
    targets: dict[str, list[str]] = defaultdict(list)
    for here, there in sorted(edges):
        targets[here].append(f"{there.removeprefix(PACKAGE + '/')} ({len(edges[here, there])})")
    print("| folder | files | lines | imports from (statements) |\n|---|---|---|---|")
    for folder in sorted(files):
        print(f"| {folder} | {files[folder]} | {lines[folder]} | {', '.join(targets[folder]) or '-'} |")
    found = circles(edges)
    print(
        f"\n{len(edges)} edges between folders, {len(found)} circles; {len(length)} files, {sum(length.values())} lines"
    )
    for circle in found[:10]:
        print("  circle: " + " -> ".join([*circle, circle[0]]))
    print("longest files: " + ", ".join(f"{path} {count}" for path, count in Counter(length).most_common(3)))


if __name__ == "__main__":
    main()
