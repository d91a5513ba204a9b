"""What a comparison needs and what it kept, checked before it is used."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mdp_mmdet3d.errors import FileFormatError, MdpError
from mdp_mmdet3d.files import read_json
from mdp_mmdet3d.runner.outputs import PLAN_FILE
from mdp_mmdet3d.runner.settings import FinetuneSettings, parse_budget
from mdp_mmdet3d.surgery.plan import PruningPlan

SCHEMA_VERSION = 1
TUNED_FILE = "tuned.json"
_TUNED = ("identity", "plan_hash", "measured_share", "dense_ms", "params", "macs")


def check_config(config: Config, path: str, checkpoint: str | None, finetune: FinetuneSettings | None) -> None:
    """Raise `MdpError` unless a config has what a comparison needs; says what is missing."""
    if not checkpoint:
        raise MdpError(f"{path} names no checkpoint: pruning random weights compares nothing; give --checkpoint")
    needed = {"test_dataloader": "the data of the metric", "test_evaluator": "the metric", "test_cfg": "dict() will do"}
    for key, what in needed.items():
        if config.get(key) is None:
            raise MdpError(f"{path} has no {key} ({what}), without which no accuracy can be compared: add one")
    if config.get("importance_dataloader") is None and config.get("train_dataloader") is None:
        raise MdpError(f"{path} has no importance_dataloader and no train_dataloader: importance needs data with truth")
    for key in ("train_dataloader", "optim_wrapper", "train_cfg") if finetune is not None else ():
        if config.get(key) is None:
            raise MdpError(f"{path} has no {key}, which fine-tuning needs: add one, or compare without --finetune")


def different_budgets(budgets: Sequence[str]) -> list[str]:
    """The budgets without those that are an earlier one in other words: 0.7 and 70%, 10ms and 100fps.

    Raises:
        MdpError: One is not understood.
    """
    found: dict[tuple[str, float], str] = {}
    for budget in budgets:
        number, unit = parse_budget(budget)
        key = ("ms", 1000 / number) if unit == "fps" else (unit, number)
        found.setdefault((key[0], round(key[1], 9)), budget)
    return list(found.values())


def check_cores(cores: Sequence[int]) -> None:
    """Raise `MdpError` on a core that this process may not use."""
    allowed = os.sched_getaffinity(0)
    missing = sorted(set(cores) - allowed)
    if missing:
        raise MdpError(
            f"--cores: this process may not use core {missing[0]}, only {', '.join(map(str, sorted(allowed)))}"
        )


def tuned_plan(folder: Path) -> dict[str, Any]:
    """What was found out about a method's plan.

    Args:
        folder: Of the plan.

    Raises:
        FileFormatError: The file is damaged, or of another plan than the one beside it.
    """
    path = folder / TUNED_FILE
    kept = read_json(path, what="tuned plan", schema_version=SCHEMA_VERSION)
    lacking = [key for key in _TUNED if key not in kept]
    plan = PruningPlan.load(folder / PLAN_FILE)
    if lacking or kept["plan_hash"] != plan.hash:
        what = f"lacks {', '.join(lacking)}" if lacking else f"is of plan {kept['plan_hash']}, beside plan {plan.hash}"
        raise FileFormatError(f"tuned plan {path} {what}: it is damaged; delete the folder {folder}, run again")
    return kept
