"""The optional parts: what a wheel asks for, what works with one of them alone, what is said where one is missing."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mdp_mmdet3d.errors import MissingExtraError
from mdp_mmdet3d.extras import MODULES, check_installed, needs
from mdp_mmdet3d.solver import ProblemDimension, ProblemTerm, PruningProblem

ROOT = Path(__file__).resolve().parents[1]
# Imported where they are used; numpy is always there, the rest belongs to what runs elsewhere or to other extras.
OTHERS = {"numpy", "setuptools", "tensorrt", "tensorrt_rtx", "timm", "mmpretrain", "psutil", "cuda", "pkg_resources"}
ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def python(code: str, present: tuple[str, ...] = (), *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code where, of the modules of the extras, only ``present`` can be found."""
    absent = sorted(MODULES - set(present))
    command = [sys.executable, "-c", ABSENT.format(absent=absent) + code, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def problem(tmp_path) -> Path:
    """Three widths of one dimension: 2 of 3 fit into half of the latency."""
    value, cost = np.array([0.0, 3.0, 4.0]), np.array([0.0, 2.0, 6.0])
    term = ProblemTerm("t", (0,), None, {"latency_ms": cost}, value)
    problem = PruningProblem("three widths", ("latency_ms",), (ProblemDimension("d", (0, 2, 4)),), (), (term,))
    problem.save(tmp_path / "problem.npz")
    return tmp_path / "problem.npz"


def test_the_solver_needs_numpy_and_pyscipopt_only(problem):
    done = python(
        "import solve; sys.argv[0] = 'solve'; sys.exit(solve.main())", ("pyscipopt",),
        str(problem), "--budget", "0.5", "--audit", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["status"] == "optimal" and found["objective"] == 3.0


@pytest.mark.parametrize(
    "changes",
    [
        {"HOME": None, "TERM": "dumb"},
        {"HOME": "/proc", "XDG_CACHE_HOME": "/proc", "XDG_CONFIG_HOME": "/proc"},
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
        {"LC_ALL": "de_DE.UTF-8", "LANG": "de_DE.UTF-8"},
    ],
)
def test_a_command_runs_from_another_folder_and_without_a_home(problem, changes):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **changes}
    command = [sys.executable, str(ROOT / "tools" / "solve.py"), str(problem), "--budget", "0.5", "--json"]
    found = {key: value for key, value in environment.items() if value is not None}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=found)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert json.loads(done.stdout)["objective"] == 3.0


def test_a_missing_solver_names_its_extra(problem):
    done = python("import solve; sys.exit(solve.main())", (), str(problem), "--budget", "0.5", "--audit")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the solver needs the Python package 'pyscipopt'" in done.stderr + done.stdout
    assert "pip install 'mdp_mmdet3d[solver]'" in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("module", "present", "missing"),
    [
        ("mdp_mmdet3d.latency.backends.onnxruntime", (), "onnx"),
        ("mdp_mmdet3d.latency.backends.onnxruntime", ("onnx",), "onnxruntime"),
        ("mdp_mmdet3d.latency.measure", ("onnx", "onnxruntime"), "rich"),
    ],
)
def test_measuring_without_its_packages_names_the_extra(module, present, missing):
    done = python(f"import {module}", present)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "MissingExtraError" in last and f"package '{missing}'" in last and "mdp_mmdet3d[latency]" in last


def test_measuring_needs_no_torch():
    code = "import mdp_mmdet3d.latency.measure, mdp_mmdet3d.latency.backends.onnxruntime"
    done = python(code, ("onnx", "onnxruntime", "rich"))
    assert done.returncode == 0, done.stderr


def test_a_command_without_its_packages_is_one_line():
    code = "sys.modules['mdp_mmdet3d_tools'] = __import__('types').ModuleType('mdp_mmdet3d_tools')\n"
    code += f"sys.modules['mdp_mmdet3d_tools'].__path__ = [{str(ROOT / 'tools')!r}]\n"
    done = python(code + "from mdp_mmdet3d.extras import prune; sys.exit(prune())")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert re.search(r"mdp-prune needs the Python package 'mm\w+', .*pip install 'mdp_mmdet3d\[all\]'", done.stderr)


def test_mmcv_is_built_by_the_command_that_is_named_where_torch_is():
    """No extra brings it: pip's isolated build of its source package would end the installation of everything."""
    done = python("from mdp_mmdet3d.extras import needs\nwith needs('all', 'mdp-prune'): import mmcv", ("torch",))
    told = re.search(r"package 'mmcv', .*: (\S+) -m pip install \"\$\(bash (\S+) (\S+)\)\"$", done.stderr.strip())
    assert told[1] == told[3] == sys.executable and Path(told[2]) == ROOT / "tools/build_mmcv.sh"
    assert Path(told[2]).is_file()
    done = python("from mdp_mmdet3d.extras import needs\nwith needs('all', 'mdp-prune'): import mmcv")
    assert done.stderr.strip().endswith("pip install 'mdp_mmdet3d[all]'")


def test_what_is_no_part_of_an_extra_is_raised_as_it_is():
    with pytest.raises(ModuleNotFoundError, match="No module named 'users_own'") as caught, needs("all", "x"):
        import users_own  # noqa: F401
    assert not isinstance(caught.value, MissingExtraError)
    check_installed("json", "solver", "x")


def test_every_import_of_another_package_is_known():
    """A new dependency has to be put into an extra and into `MODULES`."""
    found = set()
    for folder in ("mdp_mmdet3d", "projects", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    found.add((node.module or "").split(".")[0])
    ours = {"mdp_mmdet3d", "projects", "mdp_mmdet3d_tools", *(p.stem for p in (ROOT / "tools").glob("*.py"))}
    ours |= {path.stem for path in (ROOT / "mdp_mmdet3d/latency/probe").glob("*.py")}
    assert found - ours - set(sys.stdlib_module_names) - OTHERS <= MODULES
    assert {"torch", "pyscipopt", "onnx", "rich"} <= found


@pytest.mark.parametrize(("tool", "package"), [("prune", "mmengine"), ("report", "jinja2"), ("compare", "rich")])
def test_a_tool_of_a_checkout_tells_what_is_missing(tool, package):
    path = ROOT / f"tools/{tool}.py"
    run = "import runpy; path, sys.argv[1:] = sys.argv[1], ['x', '--budget', '1']; sys.argv[0] = path; "
    done = python(run + "runpy.run_path(path, run_name='__main__')", tuple(MODULES - {package}), str(path))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and f"needs the Python package {package!r}" in done.stderr
