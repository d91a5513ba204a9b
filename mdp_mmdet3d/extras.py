"""Optional parts (``pip install 'mdp_mmdet3d[solver]'``, ``[latency]``, ``[all]``) and the error where one is missing.

The console commands start here (``mdp-prune`` is ``mdp_mmdet3d.extras:prune``), before a tool imports anything heavy.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType

from mdp_mmdet3d.errors import MissingExtraError

TOOLS = "mdp_mmdet3d_tools"
TOOL_EXTRAS = {"solve": "solver"}  # what a command needs; all others need "all"
# Top-level modules that the extras bring, by themselves or with what they depend on.
MODULES = {"cv2", "jinja2", "markupsafe", "matplotlib", "mmcv", "mmdet", "mmdet3d", "mmengine", "nuscenes",
           "onnx", "onnxruntime", "onnxslim", "PIL", "pydantic", "pyquaternion", "pyscipopt",
           "rich", "scipy", "shapely", "torch", "torch_pruning", "torchvision", "yaml"}  # fmt: skip


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Imports of the packages of an extra.

    Args:
        extra: Its name in ``setup.py``.
        what: What needs it, for the message.

    Raises:
        MissingExtraError: One of `MODULES` is not installed. That of another package is raised as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in MODULES:
            raise
        raise MissingExtraError(
            f"{what} needs the Python package {package!r}, which is not installed here: {_remedy(package, extra)}",
            name=error.name,
        ) from error


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # what it is a part of is missing
        return False


def _remedy(package: str, extra: str) -> str:
    """Command that brings a package; mmcv is in no extra."""
    if package == "mmcv" and _found("torch"):
        here = Path(__file__).resolve().parents[1]
        script = here / (TOOLS if (here / TOOLS).is_dir() else "tools") / "build_mmcv.sh"
        return (
            "it has to be built for the torch that is, which takes some minutes: "
            f'{sys.executable} -m pip install "$(bash {script} {sys.executable})"'
        )
    return f"pip install 'mdp_mmdet3d[{extra}]'"


def check_installed(module: str, extra: str, what: str) -> None:
    """Raise `MissingExtraError`, as `needs` does, if ``module`` cannot be found; nothing is imported."""
    with needs(extra, what):
        if not _found(module):
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def tell_missing(tool: str) -> None:
    """From here on a package of an extra that is missing ends this process with one line on stderr and status 2.

    Args:
        tool: What runs, for the message, e.g. ``"tools/prune.py"``.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        package = (getattr(error, "name", None) or "").split(".")[0]
        if not isinstance(error, ModuleNotFoundError) or package not in MODULES:
            before(kind, error, trace)
            return
        try:
            with needs(TOOL_EXTRAS.get(Path(tool).stem, "all"), tool):
                raise error
        except MissingExtraError as missing:
            print(f"error: {missing}", file=sys.stderr, flush=True)
        os._exit(2)  # what is raised in a hook does not count

    sys.excepthook = hook


def run_tool(name: str) -> int:
    """Run ``tools/<name>.py``; its exit status, 2 with one line on stderr where an extra is missing."""
    try:
        with needs(TOOL_EXTRAS.get(name, "all"), f"mdp-{name.replace('_', '-')}"):
            return importlib.import_module(f"{TOOLS}.{name}").main()
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def __getattr__(name: str) -> Callable[[], int]:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(run_tool, name)
