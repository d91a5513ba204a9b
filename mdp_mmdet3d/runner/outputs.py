"""What pruning leaves behind: plan, pruned checkpoint and a config that plain MMEngine tools run, all or none."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from mdp_mmdet3d import __version__
from mdp_mmdet3d.adapters.find import PRUNED_TYPES
from mdp_mmdet3d.checkpoint.check import META_KEY
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import atomic_path
from mdp_mmdet3d.runner.pruned_model import read_plan
from mdp_mmdet3d.surgery.plan import PruningPlan
from mdp_mmdet3d.together import appear_together

PLAN_FILE, CHECKPOINT_FILE, CONFIG_FILE = "plan.json", "pruned.pth", "pruned_config.py"
RAW_FILE = "pruned_raw.pth"  # before repair, where it was asked for
EARLIER_PLANS = "earlier_plans"  # of a model that was pruned more than once
PRUNED_FILES = (
    PLAN_FILE,
    EARLIER_PLANS,
    CHECKPOINT_FILE,
    RAW_FILE,
    CONFIG_FILE,
    "problem.npz",
    "onnx/pruned",
    "report.json",
    "report.html",
    "structure.png",
)
"""What belongs to one plan in a work directory."""


@contextmanager
def new_pruned_model(
    folder: str | Path, pruned: nn.Module, plan: PruningPlan, weights: str, config: Config, class_names: Sequence[str]
) -> Iterator[Path]:
    """Write plan, pruned checkpoint and config into ``folder``; of an earlier plan, nothing stays.

    Yields:
        A folder for what else of `PRUNED_FILES` there is to write. When the block ends, everything moves into
        ``folder``; if anything fails, ``folder`` stays as it was.

    Args:
        folder: Work directory.
        pruned: The pruned model.
        plan: What was cut.
        weights: Where the dense weights came from.
        config: The dense config.
        class_names: In the order of the score columns.

    Raises:
        WriteError: The disk is full, or the folder cannot be written.
    """
    with appear_together(folder, PRUNED_FILES) as part:
        plan.save(part / PLAN_FILE)
        save_pruned_checkpoint(part / CHECKPOINT_FILE, pruned, plan, weights, class_names)
        write_pruned_config(part / CONFIG_FILE, config)
        yield part


def write_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """``torch.save``, atomically, and with the disk's own error where it refuses: torch would hide it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def save_pruned_checkpoint(
    path: str | Path, model: nn.Module, plan: PruningPlan, weights: str, class_names: Sequence[str]
) -> None:
    """Write the pruned state dict with its plan in the meta; readable with ``weights_only=True``.

    Args:
        path: Target file.
        model: The pruned model.
        plan: What was cut.
        weights: Where the dense weights came from.
        class_names: In the order of the score columns; MMDetection3D's ``init_model`` reads them.
    """
    meta = {
        META_KEY: plan.to_dict(),
        "mdp_weights": weights,
        "mdp_version": __version__,
        # No empty list: MMPretrain's inferencer takes the classes of the config's data set where there are none.
        **({"dataset_meta": {"classes": list(class_names)}} if class_names else {}),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    write_checkpoint(path, {"meta": meta, "state_dict": state})


def write_pruned_config(
    path: str | Path, config: Config, plan: str = PLAN_FILE, checkpoint: str = CHECKPOINT_FILE
) -> None:
    """Write a config of the pruned model; plan and checkpoint are looked for beside it, data where it lies now.

    The prune section stays, less its budget: export and test need the input's size, pruning again needs the rest.

    Args:
        path: Target ``.py`` file.
        config: The config of what was pruned: of the dense model, or of one that had been pruned before.
        plan: File name of the plan.
        checkpoint: File name of the pruned checkpoint.
    """
    content = _anchored(copy.deepcopy(config.to_dict()))
    for key in ("work_dir", "resume"):
        content.pop(key, None)
    (content.get("prune") or {}).pop("budget", None)  # it is spent
    _keep_earlier_plans(content["model"], Path(path).parent)
    content["model"] = {
        "type": PRUNED_TYPES[0],
        "architecture": content["model"],
        "plan": "{{ fileDirname }}/" + plan,
        "backbone": {},  # MMDetection's init_detector looks into it
    }
    content["load_from"] = content["checkpoint"] = "{{ fileDirname }}/" + checkpoint
    imports = list((content.get("custom_imports") or {}).get("imports", ()))
    content["custom_imports"] = {
        "imports": [*dict.fromkeys([*imports, "mdp_mmdet3d.runner"])],
        "allow_failed_imports": False,
    }
    hooks = list(content.get("custom_hooks") or ())
    if not any(hook.get("type") == "PlanHook" for hook in hooks):
        hooks.append({"type": "PlanHook"})
    content["custom_hooks"] = hooks
    with atomic_path(path) as temporary:
        Config(content).dump(temporary)


def check_not_its_own(config: Config, work_dir: Path) -> None:
    """Raise `MdpError` if pruning into ``work_dir`` would write over the config that it prunes."""
    if config.filename and Path(config.filename).resolve() == Path(work_dir, CONFIG_FILE).resolve():
        raise MdpError(
            f"{config.filename}: the model that this config describes lies in the work directory that it is pruned "
            "into, and would be overwritten; give another --work-dir"
        )


def _keep_earlier_plans(model: dict[str, Any], folder: Path) -> None:
    """Copy the plans of a model that was pruned before, the latest first, into ``folder``: theirs may go."""
    count = 0
    while model.get("type") in PRUNED_TYPES:
        count += 1
        earlier = read_plan(model["plan"])
        model["plan"] = "{{ fileDirname }}/" + f"{EARLIER_PLANS}/{count}.json"
        (folder / EARLIER_PLANS).mkdir(exist_ok=True)
        earlier.save(folder / EARLIER_PLANS / f"{count}.json")
        model = model["architecture"]


def _anchored(value: Any, roots: frozenset[str] = frozenset()) -> Any:
    """Relative ``data_root`` folders, and files below them, made absolute: the config is read from elsewhere later."""
    if isinstance(value, (list, tuple)):
        return type(value)(_anchored(item, roots) for item in value)
    if not isinstance(value, dict):
        return value
    root = value.get("data_root")
    if isinstance(root, str) and root and "://" not in root:
        roots |= {root}
    anchored = {key: _anchored(item, roots) for key, item in value.items()}
    for key in ("data_root", "ann_file"):
        path = value.get(key)
        if isinstance(path, str) and any(path == known or path.startswith(f"{known}/") for known in roots):
            anchored[key] = str(Path(path).absolute())
    return anchored
