"""What is written where: nothing of the user's is lost or mixed."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .case import Assets, Case, run_tool


def targets(assets: Assets) -> Iterator[Case]:
    """Folders that hold what is not ours."""
    from mdp_mmdet3d.files import atomic_path, write_json
    from mdp_mmdet3d.onnx.folders import new_deployment
    from mdp_mmdet3d.runtime.manifest import DeploymentManifest
    from mdp_mmdet3d.runtime.pyz import write_runtime

    manifest = DeploymentManifest.load(assets.deployment)

    def deploy(folder: Path) -> None:
        with new_deployment(folder) as part:
            manifest.save(part)

    def neighbours() -> str:
        folder = assets.folder("neighbours")
        mine = [folder / f"pruned{suffix}" / "mine" for suffix in (".old", ".part", ".fp32", ".float32")]
        for path in mine:
            path.parent.mkdir()
            path.write_text("x")
        deploy(folder / "pruned")
        deploy(folder / "pruned")
        lost = [path.parent.name for path in mine if not path.is_file()]
        assert not lost, f"lost {lost}"
        left = sorted(path.name for path in folder.iterdir())
        assert len(left) == 5, f"left behind {left}"
        return "kept"

    def inside() -> str:
        folder = assets.folder("inside") / "pruned"
        deploy(folder)
        (folder / "notes.txt").write_text("mine")
        deploy(folder)
        return f"notes.txt {'kept' if (folder / 'notes.txt').is_file() else 'deleted'}"

    def again() -> str:
        folder = assets.folder("again") / "pruned"
        deploy(folder)
        write_runtime(folder / "mdp_runtime.pyz")
        (folder / "head.sm86.engine").write_bytes(b"x")
        deploy(folder)
        return "replaced"

    def occupied() -> None:
        folder = assets.folder("occupied")
        (folder / "thesis.txt").write_text("mine")
        deploy(folder)

    def in_a_file() -> None:
        path = assets.folder("in_a_file") / "file"
        path.write_text("x")
        deploy(path / "pruned")

    def on_a_file() -> None:
        path = assets.folder("on_a_file") / "file"
        path.write_text("x")
        deploy(path)

    yield Case("pruned.old, .part, .fp32 beside the target", neighbours)
    yield Case("a file of the user's in an earlier deployment", inside, ("notes.txt",))
    yield Case("an earlier deployment with runtime and engines", again)
    yield Case("a folder that is no deployment", occupied, ("occupied",))
    yield Case("output inside a file", in_a_file, ("file",))
    yield Case("output is a file", on_a_file, ("file",))
    pipe = assets.folder("pipes") / "pipe"
    os.mkfifo(pipe)
    yield Case("JSON to a pipe", lambda: write_json(pipe, {}), ("pipe",))
    yield Case("JSON to a folder", lambda: write_json(assets.folder("a"), {}), (str(assets.work / "a"),))

    def file_inside_file() -> None:
        path = assets.folder("b") / "x"
        path.write_text("")
        with atomic_path(path / "y"):
            pass

    yield Case("JSON inside a file", file_inside_file, ("x",))


def tools(assets: Assets) -> Iterator[Case]:
    """Command lines of the other tools."""
    folder = assets.folder("tools")
    (folder / "file").write_text("x")
    (folder / "bad.py").write_text("model = dict(")
    mini = "configs/streampetr_mini.py"

    def tool(name: str, *arguments: Any) -> Callable[[], str]:
        return lambda: run_tool(name, *arguments)

    yield Case("train: a syntax error", tool("train", folder / "bad.py"), ("bad.py",))
    yield Case("prune: a syntax error", tool("prune", folder / "bad.py"), ("bad.py",))
    yield Case("export: a syntax error", tool("export", folder / "bad.py"), ("bad.py",))
    yield Case("test: a syntax error", tool("test", folder / "bad.py", "x.pth"), ("bad.py",))
    yield Case("train: no config", tool("train", folder / "none.py"), ("none.py",))
    yield Case("export: --num-frames 0", tool("export", mini, "--frames", "synthetic", "--num-frames", 0), ("frames",))
    many = 10**12
    frames = ("--frames", "synthetic", "--input-size", 64, 176, "--out", folder / "m", "--num-frames", many)
    yield Case("export: --num-frames 10^12", tool("export", mini, *frames), ("num-frames",))
    nuscenes = ("create_mini_nuscenes", folder / "n", "--easy", "--frames", many)
    yield Case("create_mini_nuscenes: --frames 10^12", tool(*nuscenes), ("frames",))
    yield Case(
        "create_mini_images: 10^12", tool("create_mini_images", "coco", folder / "n", "--images", many), ("images",)
    )
    size = ("--input-size", 64, 176)
    to_file = ("--out", folder / "file" / "x", *size)
    yield Case("export: inside a file", tool("export", mini, "--frames", "synthetic", *to_file), ("file",))
    no_size = ("--source-size", 0, 0, "--out", folder / "o", *size)
    yield Case("export: --source-size 0 0", tool("export", mini, "--frames", "synthetic", *no_size), ("source",))
    yield Case(
        "package: a folder that is none",
        tool("package_autoware", folder, folder / "p", "--node", "0.53"),
        ("deployment.json",),
    )
    for value in ("2", "-1", "nan"):
        threshold = f"--confidence-threshold={value}"
        yield Case(
            f"package: {threshold}",
            tool("package_autoware", assets.deployment, folder / "p", "--node", "0.53", threshold),
            ("threshold",),
        )
    yield Case("build_engine: no folder", tool("build_engine", folder / "none"), ("none",))
    yield Case("convert: no file", tool("convert_checkpoint", folder / "none.pth", folder / "o.pth"), ("none.pth",))
    yield Case("infos: no data", tool("create_infos", folder / "none"), ("none",))
    yield Case("solve: no problem", tool("solve", folder / "none.npz", "--budget", "0.5"), ("none.npz",))

    def default_folder() -> str:
        from mdp_mmdet3d.config_file import default_work_dir

        found = set()
        for run in ("a", "b"):
            (folder / run).mkdir()
            (folder / run / "plan.json").write_text("{}")
            found.add(default_work_dir(folder / run / "pruned_config.py", "training"))
        assert len(found) == 2, found
        return "a folder each"

    yield Case("two pruned configs trained without --work-dir", default_folder)

    def locked() -> None:
        from mmengine.config import Config

        from mdp_mmdet3d.runner.job import PruneJob
        from mdp_mmdet3d.runner.settings import PruneSettings

        work = assets.folder("locked")
        with (work / ".lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            PruneJob(Config(dict(model=dict(type="A"))), PruneSettings(), work).run()

    yield Case("two runs in one work directory", locked, ("in use", "--work-dir"))


def places(assets: Assets) -> Iterator[Case]:
    """Surroundings that a program may find itself in."""
    import mdp_mmdet3d

    root = Path(mdp_mmdet3d.__file__).parents[1]

    def run(tool: str, *arguments: Any, **changes: str | None) -> Callable[[], str]:
        def start() -> str:
            environment = {**os.environ, "PYTHONPATH": str(root), **changes}
            command = [sys.executable, "-W", "ignore", str(root / "tools" / f"{tool}.py"), *map(str, arguments)]
            found = {key: value for key, value in environment.items() if value is not None}
            done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=found, timeout=300)
            assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-300:]
            return done.stdout.strip().splitlines()[-1]

        return start

    validate = (assets.deployment, "--fps", "0.001", "--num-frames", "2", "--warmup", "0")
    for name, changes in (
        ("another folder", {}),
        ("no HOME", {"HOME": None}),
        ("a HOME that cannot be written", {"HOME": "/proc", "XDG_CACHE_HOME": "/proc", "XDG_CONFIG_HOME": "/proc"}),
        ("TERM=dumb", {"TERM": "dumb"}),
        ("a locale with decimal commas", {"LC_ALL": "de_DE.UTF-8", "LANG": "de_DE.UTF-8"}),
        ("the C locale", {"LC_ALL": "C", "PYTHONUTF8": "0"}),
    ):
        yield Case(f"validate_fps: {name}", run("validate_fps", *validate, **changes))
    yield Case("prune --help: no HOME, TERM=dumb", run("prune", "--help", HOME=None, TERM="dumb"))
    yield Case(
        "prune --help: a HOME that cannot be written", run("prune", "--help", HOME="/proc", XDG_CACHE_HOME="/proc")
    )
