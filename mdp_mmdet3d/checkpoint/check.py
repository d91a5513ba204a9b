"""What a checkpoint holds, and whether a training can start from it or go on with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mdp_mmdet3d.errors import FileFormatError, StructureMismatchError

logger = logging.getLogger(__name__)

META_KEY = "mdp_plan"
NAMED = 5  # how many entries or differences an error lists
_PROGRESS = ("last_step", "_global_step", "_last_value", "verbose")  # of a scheduler's state
_WARM_UP = ("LinearLR", "ConstantLR")  # what follows these at a constant rate is meant to
_TRAINING_STATE = ("epoch", "iter")  # of the meta; MMEngine reads both


def meta_of(checkpoint: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The meta of a checkpoint; of one that is no dictionary nothing is used, and a warning says so."""
    meta = checkpoint.get("meta")
    if meta is None:
        return {}
    if not isinstance(meta, Mapping):
        logger.warning(
            "%s: its meta is a %s (%.60r), not a dictionary, and is not used: a plan or an eps that it may name is "
            "not checked",
            name,
            type(meta).__name__,
            meta,
        )
        return {}
    return dict(meta)


def plan_hash_of(meta: Mapping[str, Any], name: str) -> str | None:
    """Hash of the plan in a checkpoint's meta, None if there is none.

    Raises:
        FileFormatError: What stands there is no plan.
    """
    plan = meta.get(META_KEY)
    if plan is None:
        return None
    if not isinstance(plan, Mapping) or not isinstance(plan.get("hash"), str):
        found = described(plan) if isinstance(plan, Mapping) else f"{type(plan).__name__} {plan!r:.60}"
        raise FileFormatError(f"{name}: its meta.{META_KEY} is no pruning plan, it holds {found}")
    return plan["hash"]


def described(entries: Mapping[Any, Any]) -> str:
    """What a mapping holds, for error messages: ``model (dict of 3), epoch (int)``."""
    shown = [f"{key} ({_kind(value)})" for key, value in list(entries.items())[:NAMED]]
    if len(entries) > NAMED:
        shown.append(f"{len(entries) - NAMED} more")
    return ", ".join(shown) or "nothing"


def check_start(checkpoint: Mapping[str, Any], model: nn.Module, name: str) -> None:
    """Check that a dense model can start from the weights of a checkpoint; it may lack some and hold others.

    Raises:
        StructureMismatchError: It is of a pruned model, of which MMEngine would load what happens to fit.
        FileFormatError: No tensor of it fits the model.
    """
    if (plan_hash := plan_hash_of(meta_of(checkpoint, name), name)) is not None:
        raise StructureMismatchError(
            f"{name} is of a pruned model (plan {plan_hash}), the config describes the dense one: train with the "
            "pruned_config.py that lies beside the plan, or start from dense weights"
        )
    own, state = model.state_dict(), _state_of(checkpoint)
    if not any(key in own and own[key].shape == value.shape for key, value in state.items()):
        raise FileFormatError(f"{name} holds no weight of this model; it holds {described(checkpoint)}")


def check_resume(checkpoint: Mapping[str, Any], model: nn.Module, name: str) -> None:
    """Check that a training of a model can go on with a checkpoint, for which every parameter must be its own.

    Raises:
        StructureMismatchError: It is of a pruned model where this one is dense, or of another model.
        FileFormatError: It has no training state.
    """
    meta = meta_of(checkpoint, name)
    plan_hash, pruned = plan_hash_of(meta, name), getattr(model, "mdp_plan", None) is not None
    if plan_hash is not None and not pruned:
        raise StructureMismatchError(
            f"{name} is of the training of a pruned model (plan {plan_hash}), the config describes the dense one: go "
            "on with the pruned_config.py that it was started with, or give another --work-dir"
        )
    missing = [f"meta.{key}" for key in _TRAINING_STATE if key not in meta]
    missing += [key for key in ("optimizer",) if key not in checkpoint]
    if missing:
        raise FileFormatError(
            f"{name} is no checkpoint of a training to go on with: it has no {', no '.join(missing)}; it holds "
            f"{described(checkpoint)}. Start from its weights with --cfg-options load_from=FILE instead"
        )
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in _state_of(checkpoint).items()}
    if pruned:
        check_pruned_state(own, found, name)
        return
    trained = {key for key, _ in model.named_parameters()}
    # A buffer may be new in this release; a tensor that the model does not know had a place in the optimizer.
    differences = [line for key, line in state_differences(own, found) if key in trained or key not in own]
    if differences:
        raise StructureMismatchError(
            f"{name} is of the training of another model: go on with the config that it was started with, or give "
            f"another --work-dir.\n{listed(differences)}"
        )


def check_pruned_state(expected: Mapping[str, tuple], found: Mapping[str, tuple], name: str = "the checkpoint") -> None:
    """Check that tensors are exactly those of a pruned model.

    Args:
        expected: Shapes of the model's tensors by name.
        found: Those of the checkpoint.
        name: How errors call it.

    Raises:
        StructureMismatchError: Names the first differing keys with expected and found shapes.
    """
    differences = [line for _, line in state_differences(expected, found)]
    if differences:
        raise StructureMismatchError(
            f"{name} does not fit this pruned model; it was saved with another plan or is dense.\n{listed(differences)}"
        )


def check_schedule(checkpoint: Mapping[str, Any], schedulers: Any, name: str) -> None:
    """Check that a training goes on by the schedule that its config states: MMEngine takes that of the checkpoint.

    Args:
        checkpoint: Of a training, with ``param_schedulers``.
        schedulers: As the config's were built, a list or lists by name.
        name: How errors call the checkpoint.

    Raises:
        StructureMismatchError: The two differ; a longer schedule would be trained at the last rate of the shorter one.
    """
    saved = checkpoint.get("param_schedulers") or []
    pairs = (
        [(key, saved.get(key, []), schedulers[key]) for key in schedulers]
        if isinstance(saved, Mapping) and isinstance(schedulers, Mapping)
        else [("param_scheduler", saved, schedulers or [])]
    )
    lines = []
    for key, olds, news in pairs:
        if len(olds) != len(news):
            lines.append(f"{key}: {len(olds)} schedulers in the checkpoint, {len(news)} in the config")
        for index, (old, new) in enumerate(zip(olds, news)):
            stated = new.state_dict()
            lines += [
                f"{key}[{index}] {type(new).__name__}.{setting}: {old[setting]!r} in the checkpoint, "
                f"{stated[setting]!r} in the config"
                for setting in stated.keys() & old.keys() - set(_PROGRESS)
                if old[setting] != stated[setting]
            ]
    if lines:
        raise StructureMismatchError(
            f"{name} was trained by another schedule, which resuming would keep, to its end and then at its last rate. "
            "Go on with the old schedule in the config, or start a new one from these weights: --cfg-options "
            f"load_from=FILE without --resume.\n{listed(sorted(lines))}"
        )


def after_schedule(schedulers: Any, steps: Mapping[bool, int]) -> str | None:
    """What is left of a training when the last of its schedulers has ended, in words; None where one lasts to its end
    or the rate only rises.

    Args:
        schedulers: As they were built, a list or lists by name.
        steps: Length of the training: in epochs (True) and in iterations (False).
    """
    found = schedulers.values() if isinstance(schedulers, Mapping) else [schedulers or []]
    falling = [item for group in found for item in group if type(item).__name__ not in _WARM_UP]
    if not falling or any(item.end >= steps[item.by_epoch] for item in falling):
        return None
    last = max(falling, key=lambda item: item.end / steps[item.by_epoch])
    return (
        f"the schedule of the learning rate ends at {'epoch' if last.by_epoch else 'iteration'} {last.end} of "
        f"{steps[last.by_epoch]}: the rest is trained at its last rate. To train longer, change param_scheduler "
        "together with train_cfg"
    )


def state_differences(expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> list[tuple[str, str]]:
    """Names whose shapes differ, each with a line for an error message."""
    return [
        (key, f"{key}: expected {expected.get(key, 'nothing')}, found {found.get(key, 'nothing')}")
        for key in sorted(expected.keys() | found.keys())
        if expected.get(key) != found.get(key)
    ]


def listed(lines: list[str]) -> str:
    """The first lines, indented, and how many there are more."""
    more = len(lines) - NAMED
    return "\n".join(f"  {line}" for line in lines[:NAMED]) + (f"\n  ... and {more} more" if more > 0 else "")


def _state_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights by name, as MMEngine looks for them."""
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, Mapping):
        return {}
    return {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}


def _kind(value: Any) -> str:
    if isinstance(value, Mapping) and value and all(isinstance(item, Tensor) for item in value.values()):
        return f"{len(value)} tensors"
    if isinstance(value, (Mapping, list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
