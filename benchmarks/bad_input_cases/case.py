"""What a case is, and the small models and data that cases share."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """One bad, or unusual, input.

    Attributes:
        name: Of the input.
        run: Feeds it; raises `AssertionError` where something good comes out wrong.
        names: What the error must name; empty for input that is unusual but good.
    """

    name: str
    run: Callable[[], Any]
    names: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Assets:
    """What cases start from; they copy it.

    Attributes:
        deployment: Folder of the tests' tiny StreamPETR, float32.
        checkpoint: Its weights.
        nuscenes: A miniature nuScenes of 2 + 1 scenes of 3 frames.
        work: Folder to write to.
    """

    deployment: Path
    checkpoint: Path
    nuscenes: Path
    work: Path

    def folder(self, name: str) -> Path:
        """A new, empty folder."""
        path = self.work / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


def make_assets(folder: Path, work: Path) -> Assets:
    """Make models and data in ``folder``, unless they are there."""
    assets = Assets(folder / "deployment", folder / "tiny.pth", folder / "nuscenes", work)
    if not assets.nuscenes.is_dir():
        import torch
        from mmengine.registry import init_default_scope

        import projects.streampetr  # noqa: F401
        from mdp_mmdet3d.simdata.mini_nuscenes import MiniNuScenesSpec, write_mini_nuscenes
        from projects.streampetr.export import export_streampetr

        init_default_scope("mmdet3d")
        tiny = load_module(ROOT / "tests" / "tiny_deployment.py")
        model = tiny.build_tiny()
        folder.mkdir(parents=True, exist_ok=True)
        size, names = tiny.INPUT_SIZE, tiny.CLASS_NAMES
        export_streampetr(model, assets.deployment, class_names=names, input_size=size, weights="random")
        torch.save({"state_dict": model.state_dict(), "meta": {}}, assets.checkpoint)
        spec = MiniNuScenesSpec(scenes=3, frames=3, seed=3, image_size=(320, 180))
        write_mini_nuscenes(assets.nuscenes, spec)
    return assets


def load_module(path: Path) -> Any:
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def run_tool(name: str, *arguments: Any) -> str:
    """Run ``tools/<name>.py`` in this process.

    Returns:
        What it printed, if its exit status is 0 or 3 (a requirement missed).

    Raises:
        MdpError: It ended with status 2 and a message.
    """
    import mdp_mmdet3d
    from mdp_mmdet3d.errors import MdpError

    module = load_module(Path(mdp_mmdet3d.__file__).parents[1] / "tools" / f"{name}.py")
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = module.main()
    except SystemExit as error:  # argparse
        status = error.code
    finally:
        sys.argv = argv
    printed = out.getvalue() + err.getvalue()
    if status == 2 and "error:" in printed and "Traceback" not in printed:
        raise MdpError(printed[printed.index("error:") :].strip())
    if status not in (0, 3):
        raise AssertionError(f"exit status {status}: {printed[-300:]}")
    return printed.strip().splitlines()[-1] if printed.strip() else ""


def edited(value: Any, index: Any, new: Any) -> Any:
    """Copy of an array with one element changed."""
    import numpy as np

    value = np.array(value)
    value[index] = new
    return value
