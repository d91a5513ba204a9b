"""Reading a checkpoint safely, and loading it strictly into a model of any kind."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdp_mmdet3d.checkpoint.check import described, meta_of, plan_hash_of
from mdp_mmdet3d.checkpoint.safe_loading import register_safe_globals
from mdp_mmdet3d.errors import FileFormatError, StructureMismatchError
from mdp_mmdet3d.surgery.plan import PruningPlan

register_safe_globals()

WRAPPER_PREFIXES = ("module.", "model.")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Args:
        path: A file of ``torch.save``: a mapping with ``state_dict``, or a bare state dict.

    Returns:
        A mapping with at least ``state_dict`` (without wrapper prefixes) and ``meta``, which is empty (with a warning)
        where the file's is no dictionary.

    Raises:
        FileFormatError: The file is missing, truncated, needs code to load, or holds no state dict.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileFormatError(f"checkpoint {path} does not exist") from error
    except pickle.UnpicklingError as error:
        raise FileFormatError(
            f"{path} is corrupt or holds more than tensors and plain values ({_first_line(error)}); "
            "if you trust it, save its state_dict alone with torch.save and load that"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise FileFormatError(f"{path} is truncated or no checkpoint ({_first_line(error)})") from error
    if not isinstance(data, Mapping):
        raise FileFormatError(f"checkpoint {path} holds a {type(data).__name__} instead of a state dict")
    if "state_dict" not in data:
        _check_state_dict(data, f"checkpoint {path} has no entry state_dict and is no state dict itself")
        data = {"state_dict": data}
    state = data["state_dict"]
    _check_state_dict(state, f"checkpoint {path}: its entry state_dict is no state dict")
    for prefix in WRAPPER_PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return {**data, "state_dict": dict(state), "meta": meta_of(data, f"checkpoint {path}")}


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint into a model with exactly its names and shapes.

    Args:
        model: Dense, or pruned: then the file must carry the same plan.
        path: The checkpoint.

    Raises:
        FileFormatError: See `read_checkpoint`.
        StructureMismatchError: The checkpoint is that of another model or plan.
    """
    checkpoint = read_checkpoint(path)
    if (plan := getattr(model, "mdp_plan", None)) is not None:
        check_meta(checkpoint["meta"], plan, f"checkpoint {path}")
    state, own = checkpoint["state_dict"], model.state_dict()
    # Counters that frozen batch norms of other releases lack; nothing is computed with them.
    state |= {key: own[key] for key in own if key.endswith(".num_batches_tracked") and key not in state}
    check_structure(state, own, str(path))
    model.load_state_dict(state, strict=True)


def check_meta(meta: Mapping[str, Any], plan: PruningPlan, name: str = "the checkpoint") -> None:
    """Raise `StructureMismatchError` if a checkpoint's meta carries another plan than ``plan``."""
    stored = plan_hash_of(meta, name)
    if stored is not None and stored != plan.hash:
        raise StructureMismatchError(
            f"{name} was saved with plan {stored}, the config names plan {plan.hash}; "
            "use the plan.json that lies beside the checkpoint"
        )


def check_structure(state: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str, remedy: str = "") -> None:
    """Check that names and shapes of two state dicts are the same.

    Args:
        state: Of the file.
        own: Of the model.
        what: How errors call the file.
        remedy: What else may help, behind "use the config it was trained with".

    Raises:
        StructureMismatchError: They differ; names the first keys with expected and found shapes.
    """
    problems = []
    for key, value in own.items():
        if key not in state:
            problems.append(f"{key} expected {tuple(value.shape)}, not found")
        elif state[key].shape != value.shape:
            problems.append(f"{key} expected {tuple(value.shape)}, found {tuple(state[key].shape)}")
    problems += [f"{key} not expected, found {tuple(v.shape)}" for key, v in state.items() if key not in own]
    if problems:
        shown = "; ".join(problems[:5])
        raise StructureMismatchError(
            f"{what} is of another model, {len(problems)} differences in {len(own)} tensors: {shown}. "
            f"Use the config it was trained with{remedy}"
        )


def _check_state_dict(state: Any, complaint: str) -> None:
    """Raise `FileFormatError`, with what is there, unless ``state`` is tensors by name."""
    if not isinstance(state, Mapping):
        raise FileFormatError(f"{complaint}: it is a {type(state).__name__}")
    if not state or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise FileFormatError(
            f"{complaint}: it holds {described(state)}. If one of these is the weights by name, save that one alone "
            "with torch.save and load it"
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
