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
    assert "mdp_mmdet3d_tools/build_mmcv.sh" in names


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


ELSEWHERE = {
    "no home, a dumb terminal": {"HOME": None, "TERM": "dumb"},
    "a home that cannot be written, a locale with commas": {
        "HOME": "/proc/none",
        "LC_ALL": "de_DE.UTF-8",
        "LC_NUMERIC": "de_DE.UTF-8",
    },
}


@pytest.fixture(scope="module")
def beside_projects(wheel, tmp_path_factory) -> Path:
    """A user's folder with a project of their own; the unpacked wheel is in ``site`` beside it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    (folder / "user/projects/mine").mkdir(parents=True)
    (folder / "user/projects/mine/__init__.py").write_text("NAME = 'theirs'\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("changes", ELSEWHERE.values(), ids=ELSEWHERE)
def test_installed_beside_a_users_projects_a_model_is_exported(beside_projects, changes, tmp_path):
    """The folder of the deployment holds the runtime too, which is made of the installed tools."""
    folder, out = beside_projects, tmp_path / "deployment"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder / "user", folder / "site")))}
    environment = {name: value for name, value in (environment | changes).items() if value is not None}
    code = (
        "import sys, projects.mine, projects.streampetr, mdp_mmdet3d_tools.export as tool; "
        "assert projects.mine.NAME == 'theirs'; print(tool.__file__, projects.streampetr.__file__); "
        "sys.exit(tool.main())"
    )
    config, options = "mdp_mmdet3d::streampetr_mini_mdp.py", ["--frames", "synthetic", "--num-frames", "1"]
    command = [sys.executable, "-c", code, config, *options, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder / "user")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(file.startswith(str(folder / "site")) for file in done.stdout.splitlines()[0].split())
    assert (out / "head.onnx").is_file() and list(out.parent.rglob("mdp_runtime.pyz"))
    assert "\x1b" not in done.stdout and [path.name for path in (folder / "user").iterdir()] == ["projects"]


def test_shipped_configs_have_names_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_config("mdp_mmdet3d::streampetr_mdp.py")
    assert config.filename == str(ROOT / "configs/streampetr_mdp.py")
    with pytest.raises(MdpError, match=r"is mdp_mmdet3d::streampetr/streampetr_r50_704x256_428q\.py meant"):
        read_config("configs/streampetr/streampetr_r50_704x256_428q.py")
    for name in ("mdp_mmdet3d::nothing.py", "nothing.py", "mine/configs/nothing.py"):
        with pytest.raises(MdpError, match=r"the main one is mdp_mmdet3d::streampetr_mdp\.py"):
            read_config(name)
