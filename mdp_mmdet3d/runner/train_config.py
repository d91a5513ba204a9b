"""What ``tools/train.py`` makes of a config: optional sections, where to go on, what cannot work."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.sections import check_keys

SECTIONS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    # section: hook, what it always gets, keys a config may set
    "ema": ("EMAHook", {"strict_load": True}, ("momentum", "begin_iter", "interval")),
    "distillation": (
        "DistillationHook",
        {},
        ("teacher_config", "teacher_checkpoint", "logits_weight", "features_weight"),
    ),
}
_NUMBERED = re.compile(r"(?:iter|epoch)_(\d+)\.pth")


def add_optional_hooks(config: Config) -> None:
    """Turn the sections ``ema=dict(...)`` and ``distillation=dict(...)`` into custom hooks, in place.

    Sections, unlike a list of hooks, can be set on the command line and inherited key by key. None switches one off.

    Raises:
        MdpError: A section has an unknown key, or a distillation lacks its teacher.
    """
    for section, (hook, fixed, known) in SECTIONS.items():
        values: Mapping[str, Any] | None = config.pop(section, None)
        if values is None:
            continue
        check_keys(values, known, section)
        if section == "distillation":
            for key in ("teacher_config", "teacher_checkpoint"):
                if not values.get(key):
                    raise MdpError(
                        f"the config's distillation section lacks {key}: name the dense model's config and its weights"
                    )
        config.custom_hooks = [*(config.get("custom_hooks") or ()), {"type": hook, **fixed, **values}]


def latest_checkpoint(work_dir: str | Path) -> Path | None:
    """The newest checkpoint that was written completely, or None.

    MMEngine's own search trusts a file with a name, which a killed process may leave empty or pointing to a truncated
    checkpoint.
    """
    found = {path: int(match[1]) for path in Path(work_dir).glob("*.pth") if (match := _NUMBERED.fullmatch(path.name))}
    for path in sorted(found, key=lambda p: found[p], reverse=True):
        if zipfile.is_zipfile(path):  # its directory is written last
            return path
        print_log(f"{path} is truncated and not used", "current", level=30)
    return None


def choose_start(config: Config, resume: str | None) -> None:
    """Set ``resume`` and ``load_from`` of a config.

    Args:
        config: Changed in place.
        resume: None starts anew (from the config's ``load_from``, if any); ``"auto"`` goes on from the latest
            checkpoint in the work directory, or starts anew where there is none; else the checkpoint to go on from.

    Raises:
        MdpError: The file to start from does not exist, or the one to go on from is damaged.
    """
    checkpoint = latest_checkpoint(config.work_dir) if resume == "auto" else resume
    config.resume = checkpoint is not None
    if checkpoint is not None:
        config.load_from = str(checkpoint)
    if config.get("load_from") and not Path(config.load_from).is_file():
        raise MdpError(f"checkpoint {config.load_from} does not exist")
    if checkpoint is not None and not zipfile.is_zipfile(checkpoint):
        raise MdpError(
            f"{checkpoint} is truncated or no checkpoint; go on from another one, or with --resume alone from the "
            "latest complete one in the work directory"
        )


def check_loaders(config: Config) -> None:
    """Refuse what would train or evaluate something else than meant.

    Raises:
        MdpError: An evaluation reads several frames of one stream as columns of a batch, or checkpoints are deleted
            before the next one is there.
    """
    for name in ("val_dataloader", "test_dataloader"):
        loader = config.get(name)
        if loader and loader.get("sampler", {}).get("type") == "SceneSampler" and loader.get("batch_size", 1) != 1:
            raise MdpError(
                f"{name}.batch_size = {loader.batch_size}: a stream is evaluated frame by frame, so the "
                "batch size must be 1; use more processes (torchrun) to go faster"
            )
    saving = (config.get("default_hooks") or {}).get("checkpoint") or {}
    if saving.get("max_keep_ckpts") == 1:
        raise MdpError(
            "default_hooks.checkpoint.max_keep_ckpts = 1: MMEngine deletes the only checkpoint before it "
            "writes the next, so a kill at that moment loses everything; keep 2 or more"
        )
