"""What a wheel holds, and what is found from it in another folder."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mdp_mmdet3d import __version__
from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.errors import MdpError

ROOT = Path(__file__).resolve().parents[1]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
# Where the files of a folder here lie in the wheel.
PLACES = {
    "mdp_mmdet3d": "mdp_mmdet3d",
    "projects/streampetr": "projects/streampetr",
    "tools": "mdp_mmdet3d_tools",
    "configs": "mdp_mmdet3d/.mim/configs",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools would leave build/ in the checkout and stale files in the next wheel."""
    source, out = tmp_path_factory.mktemp("source") / "repository", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("mdp_mmdet3d", "projects", "tools", "configs", "checkpoints"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
@pytest.mark.parametrize("folder", PLACES)
def test_the_wheel_holds_every_file_and_no_other(folder, names):
    place = PLACES[folder]
    ours = {f"{place}/{path.relative_to(ROOT / folder).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
    found = {name for name in names if name.startswith(f"{place}/") and name.endswith(".py")}
    if folder == "mdp_mmdet3d":
        found = {name for name in found if not name.startswith("mdp_mmdet3d/.mim/")}
    assert found == ours and len(ours) > 10


@pytest.mark.slow
def test_the_wheel_adds_one_name_to_projects_and_nothing_beside(wheel, names):
    metadata = f"mdp_mmdet3d-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"mdp_mmdet3d", "mdp_mmdet3d_tools", "projects", metadata}
    assert {name.split("/")[1] for name in names if name.startswith("projects/")} == {"streampetr"}
    assert {"mdp_mmdet3d/py.typed", "mdp_mmdet3d/.mim/checkpoints/streampetr_mini.pth"} <= names


@pytest.mark.slow
def test_every_tool_is_a_console_script(wheel):
    points = configparser.ConfigParser()
    text = zipfile.ZipFile(wheel).read(f"mdp_mmdet3d-{__version__}.dist-info/entry_points.txt").decode()
    points.read_string(text)
    assert dict(points["console_scripts"]) == {
        f"mdp-{name.replace('_', '-')}": f"mdp_mmdet3d.extras:{name}" for name in TOOLS
    }


@pytest.mark.slow
def test_tools_and_configs_are_found_in_an_unpacked_wheel(wheel, tmp_path):
    """Nothing of the checkout is on the path of the processes."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def python(code: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    files = python(
        "import mdp_mmdet3d_tools.solve as s, mdp_mmdet3d.config_file as c; print(s.__file__); print(c.__file__); "
        "print(c.read_config('mdp_mmdet3d::streampetr_mini_mdp.py').filename); "
        "print(c.read_config('mdp_mmdet3d::streampetr_mini_mdp.py').checkpoint)"
    )
    assert all(Path(file).is_relative_to(tmp_path / "site") and Path(file).is_file() for file in files), files


def test_shipped_configs_have_names_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_config("mdp_mmdet3d::streampetr_mdp.py")
    assert config.filename == str(ROOT / "configs/streampetr_mdp.py")
    with pytest.raises(MdpError, match=r"is mdp_mmdet3d::streampetr/streampetr_r50_704x256_428q\.py meant"):
        read_config("configs/streampetr/streampetr_r50_704x256_428q.py")
    for name in ("mdp_mmdet3d::nothing.py", "nothing.py", "mine/configs/nothing.py"):
        with pytest.raises(MdpError, match=r"the main one is mdp_mmdet3d::streampetr_mdp\.py"):
            read_config(name)
