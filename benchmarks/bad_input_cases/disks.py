"""Full and read-only file systems, really mounted; needs root, as in a container."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .case import Assets, Case, load_module, run_tool

ROOT = Path(__file__).resolve().parents[2]
FULL, READ_ONLY = "No space left on device", "Read-only file system"
RELEASE = "0.53"


def mount(*arguments: str) -> bool:
    """Run ``mount``; False where it is refused."""
    return os.geteuid() == 0 and subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A small disk at ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    if not mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)):
        raise AssertionError("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def contents(folder: Path) -> dict[str, str | bytes]:
    """Everything below a folder, hidden too, but not TensorRT's timing cache, which a next build uses."""
    paths = [path for path in folder.rglob("*") if not path.name.endswith(".timing.cache")]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else "" for path in paths}


def disks(assets: Assets) -> Iterator[Case]:
    """Every tool that writes, where there is no room or no permission to write; what was there must stay as it was."""
    from mmengine.config import Config

    folder = assets.folder("disks")
    tiny = load_module(ROOT / "tests" / "tiny_deployment.py")
    config = folder / "tiny.py"
    Config(
        {
            "model": tiny.tiny_config(),
            "class_names": list(tiny.CLASS_NAMES),
            "prune": {"input_size": tiny.INPUT_SIZE},
        }
    ).dump(config)
    export = ("export", config, "--checkpoint", assets.checkpoint, "--frames", "synthetic", "--num-frames", 1, "--out")
    autoware = folder / "autoware"

    def empty(place: Path) -> None:
        """Nothing is there before."""

    def filled(place: Path) -> None:
        (place / "filler").write_bytes(bytes(4096))

    def deployed(place: Path) -> None:
        shutil.copytree(assets.deployment, place / "deployment")

    def case(
        name: str, size: str | None, prepare: Callable[[Path], Any], command: Callable[[Path], tuple[Any, ...]]
    ) -> Case:
        """``size`` of the disk, or kilobytes left beside what is prepared ("+64"); None: read-only."""

        def run() -> str:
            with disk(folder / "disk", "64m" if size is None or size[0] == "+" else size) as place:
                prepare(place)
                if size is None:
                    mount("-o", "remount,ro", str(place))
                elif size[0] == "+":
                    state = os.statvfs(place)
                    used = (state.f_blocks - state.f_bfree) * state.f_frsize // 1024
                    mount("-o", f"remount,size={used + int(size[1:])}k", str(place))
                before = contents(place)
                try:
                    return run_tool(*command(place))
                finally:
                    after = contents(place)
                    assert after == before, f"left behind or lost: {sorted(before.keys() ^ after.keys())}"

        return Case(name, run, (str(folder / "disk"), READ_ONLY if size is None else FULL))

    for size in ("64k", "1m", "3m", None):
        what = "read-only" if size is None else f"{size} in all"
        yield case(f"export: {what}", size, empty, lambda place: (*export, place / "out"))
    float16 = ("--precision", "float16")
    for size in ("2m", "5m"):
        yield case(f"export float16: {size} in all", size, empty, lambda place: (*export, place / "out", *float16))
    yield case("export over an earlier one: 100k left", "+100", deployed, lambda p: (*export, p / "deployment"))
    for size in ("+16", "+600", None):
        what = "read-only" if size is None else f"{size[1:]}k left"
        yield case(
            f"build_engine: {what}",
            size,
            deployed,
            lambda place: ("build_engine", place / "deployment", "--capability", "8.6"),
        )
    for size in ("64k", "2m", None):
        what = "read-only" if size is None else f"{size} in all"

        def package(place: Path) -> tuple[Any, ...]:
            if not autoware.is_dir():
                run_tool(*export, autoware, "--layout", "autoware", "--node", RELEASE)
            return ("package_autoware", autoware, place / "package", "--node", RELEASE)

        yield case(f"package_autoware: {what}", size, empty, package)
    validate = ("validate_fps", assets.deployment, "--fps", 0.001, "--num-frames", 2, "--warmup", 0)
    for size in ("64k", None):
        what = "read-only" if size is None else f"{size} in all"
        yield case(
            f"convert_checkpoint: {what}",
            size,
            empty,
            lambda place: ("convert_checkpoint", assets.checkpoint, place / "o.pth"),
        )
        easy = ("--scenes", 2, "--frames", 2, "--easy", "--workers", 1)
        yield case(
            f"create_mini_nuscenes: {what}",
            size,
            empty,
            lambda place, easy=easy: ("create_mini_nuscenes", place / "n", *easy),
        )
        yield case(
            f"create_mini_images: {what}",
            size,
            empty,
            lambda place: ("create_mini_images", "coco", place / "n"),
        )
    yield case("validate_fps --json: read-only", None, empty, lambda place: (*validate, "--json", place / "fps.json"))
    yield case("validate_fps --json: full", "+0", filled, lambda place: (*validate, "--json", place / "fps.json"))
    mini = "configs/streampetr_mini.py"
    for tool in ("prune", "train"):
        yield case(f"{tool}: read-only", None, empty, lambda place, tool=tool: (tool, mini, "--work-dir", place / "w"))
