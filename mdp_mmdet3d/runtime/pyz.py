"""The runtime as one file for a vehicle: Python >= 3.8, numpy, and ONNX Runtime or TensorRT; Pillow for images."""

from __future__ import annotations

import zipfile
from pathlib import Path

import mdp_mmdet3d
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import atomic_path

FOLDERS = ("runtime", "trt")
"""Packed whole."""

BASE = ("__init__", "device", "errors", "files", "plausible", "tensor_spec", "together")
"""What these folders stand on."""

RUNTIME_FILE = "mdp_runtime.pyz"

COMMANDS = ("validate_fps", "build_engine")
"""Tools that run there."""

_MAIN = '''"""python mdp_runtime.pyz {commands} ARGUMENTS"""
import importlib
import sys

if len(sys.argv) < 2 or sys.argv[1] not in {names!r}:
    sys.exit("usage: python mdp_runtime.pyz {commands} [-h] ...")
command = sys.argv.pop(1)
sys.exit(importlib.import_module(command).main())
'''


def write_runtime(path: str | Path) -> Path:
    """Write ``mdp_runtime.pyz``: ``python mdp_runtime.pyz validate_fps DEPLOY_DIR --fps 30``.

    A program imports it with ``sys.path.insert(0, "mdp_runtime.pyz")`` and then
    ``from mdp_mmdet3d.runtime.stream import Frame, StreamRunner``.

    Args:
        path: File to write. Equal sources give equal bytes.

    Raises:
        MdpError: The tools are not beside the package.
    """
    package = Path(mdp_mmdet3d.__file__).parent
    # Beside an installed package the folder has the name that setup.py gives it.
    places = [package.parent / name for name in ("mdp_mmdet3d_tools", "tools")]
    tools = next((place for place in places if place.is_dir()), places[-1])
    modules = [package / f"{name}.py" for name in BASE]
    modules += [path for folder in FOLDERS for path in (package / folder).rglob("*.py")]
    sources = {f"mdp_mmdet3d/{path.relative_to(package).as_posix()}": path for path in modules}
    sources |= {f"{name}.py": tools / f"{name}.py" for name in COMMANDS}
    if missing := [str(source) for source in sources.values() if not source.is_file()]:
        raise MdpError(f"the vehicle's runtime needs {missing}; install mdp_mmdet3d again, or run from a checkout")
    files = {name: source.read_text(encoding="utf-8") for name, source in sources.items()}
    files["__main__.py"] = _MAIN.format(commands="|".join(COMMANDS), names=COMMANDS)
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, date_time=(2020, 1, 1, 0, 0, 0)), files[name])
    return Path(path)
