"""`projects` is shared with the projects of an MMDetection3D checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXTEND = '__path__ = __import__("pkgutil").extend_path(__path__, __name__)\n'
BOTH = (
    "import projects.BEVFusion.bevfusion as theirs, projects.PETR.mmdet3d_plugin; assert theirs.BEVFusion == 'theirs'; "
)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The layout of MMDetection3D 1.4: projects without __init__.py, a project with one and one without."""
    for name, text in (
        ("projects/BEVFusion/bevfusion/__init__.py", "from .bevfusion import BEVFusion\n"),
        ("projects/BEVFusion/bevfusion/bevfusion.py", "BEVFusion = 'theirs'\n"),
        ("projects/PETR/__init__.py", ""),
        ("projects/PETR/mmdet3d_plugin/__init__.py", ""),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def run(code: str, *places: Path, folder: Path, site: bool = False) -> subprocess.CompletedProcess:
    """Run Python with ``places`` on its path; without ``site``, what is installed (this project too) is not seen."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
    command = [sys.executable, *([] if site else ["-S"]), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def find(name: str) -> str:
    return f"import importlib.util; spec = importlib.util.find_spec({name!r}); print(spec.origin)"


@pytest.mark.parametrize("ours_first", [True, False])
def test_both_are_found_in_any_order_of_the_path(checkout, ours_first):
    places = (ROOT, checkout) if ours_first else (checkout, ROOT)
    done = run(BOTH + find("projects.streampetr"), *places, folder=checkout.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "projects/streampetr/__init__.py")


@pytest.mark.slow
def test_both_really_import_in_the_folder_of_the_checkout(checkout):
    """The checkout as the working directory, as its own tools are used."""
    code = BOTH + "import projects.streampetr; from mmdet3d.registry import MODELS; print(MODELS.get('StreamPETR'))"
    done = run(code, ROOT, folder=checkout, site=True)
    assert done.returncode == 0, done.stderr
    assert "projects.streampetr.detector.StreamPETR" in done.stdout


def test_an_init_of_the_users_hides_ours_until_it_extends_its_path(checkout):
    """Python's rule: a package with __init__.py ends the search for its parts. The documented line undoes it."""
    (checkout / "projects/__init__.py").write_text("")
    hidden = run(find("projects.streampetr"), checkout, ROOT, folder=checkout.parent)
    assert hidden.returncode != 0 and "'NoneType' object has no attribute 'origin'" in hidden.stderr
    (checkout / "projects/__init__.py").write_text(EXTEND)
    done = run(BOTH + find("projects.streampetr"), checkout, ROOT, folder=checkout.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "projects/streampetr/__init__.py")
    assert EXTEND.strip() in (ROOT / "docs/streampetr.md").read_text(encoding="utf-8")
