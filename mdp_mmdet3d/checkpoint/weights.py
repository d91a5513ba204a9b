"""The weights in a checkpoint of whatever maker: where they are, what stands before their names and beside them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mdp_mmdet3d.checkpoint.check import described
from mdp_mmdet3d.errors import FileFormatError

ENTRIES = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
"""Where training programs put the weights; the first that holds tensors by name is taken."""
AVERAGED_ENTRIES = ("ema_state_dict", "state_dict_ema", "model_ema", "ema")
"""Where they put averaged weights: taken on request, or where there are no others."""
WRAPPERS = ("module.", "_orig_mod.", "model.", "architecture.", "student.")
"""Before every name: data parallel and averaging, torch.compile, trainers, MMRazor, distillation."""
BESIDE = {"student.": ("teacher.", "distiller.", "connectors."), "architecture.": ("mutator", "distiller.", "teacher.")}
"""What such a file holds besides the model."""
COUNTERS = ("steps", "n_averaged")
"""Of averaged models: how many updates went in."""
EMA = "ema_"
LEARNED = (".weight", ".bias", "running_mean", "running_var")


@dataclass
class Weights:
    """What `find_weights` found.

    Attributes:
        state: Tensors by name.
        notes: What was taken and what was left out, in words; empty where the file is a plain one.
    """

    state: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def find_weights(data: Mapping[Any, Any], what: str, own: Collection[str] = (), averaged: bool = False) -> Weights:
    """Find the weights in a checkpoint's content and bring their names to the model's.

    Args:
        data: A state dict, or a mapping that has one.
        what: How errors call the file.
        own: Names of the model, where it is known: a prefix stays if they have it too.
        averaged: Take averaged weights (EMA) where the file has both.

    Raises:
        FileFormatError: There are no weights, no averaged ones although these are asked for, only averaged ones whose
            names need the model's, or one is not finite.
    """
    entry, state = _entry(data, what, averaged)
    found = Weights(dict(state), [] if entry in ("", "state_dict") else [f"took the entry {entry!r}"])
    _unwrap(found, own)
    _separate_ema(found, own, what, averaged and entry not in AVERAGED_ENTRIES)
    check_finite(found.state, what)
    return found


def check_finite(state: Mapping[str, Tensor], what: str) -> None:
    """Raise `FileFormatError` if a weight is NaN, or one that is learned infinite: such a model is blind without an
    error, because activations turn NaN into 0."""
    for name, value in state.items():
        if not value.is_floating_point() or bool(torch.isfinite(value).all()):
            continue
        count = int((~torch.isfinite(value)).sum())
        if bool(value.isnan().any()) or name.endswith(LEARNED):
            raise FileFormatError(
                f"{what}: {name} holds {count} of {value.numel()} values that are NaN or infinite; take an earlier "
                "checkpoint of that training"
            )


def _entry(data: Mapping[Any, Any], what: str, averaged: bool) -> tuple[str, Mapping[str, Tensor]]:
    """Name of the entry with the weights ("" if it is the file itself), and these."""
    order = (*AVERAGED_ENTRIES, *ENTRIES) if averaged else (*ENTRIES, *AVERAGED_ENTRIES)
    for entry in order:
        value = data.get(entry)
        if isinstance(value, Mapping) and value and "state_dict" in value and not _is_state(value):
            value = value["state_dict"]
        if isinstance(value, Mapping) and _is_state(value):
            return entry, value
        if entry == "state_dict" and value is not None:
            break
    if _is_state(data):
        return "", data
    inner = data.get("state_dict")
    if isinstance(inner, Mapping):
        complaint = f"{what}: its entry state_dict is no state dict: it holds {described(inner)}"
    elif inner is not None:
        complaint = f"{what}: its entry state_dict is no state dict: it is a {type(inner).__name__}"
    else:
        complaint = f"{what} has no entry state_dict and is no state dict itself: it holds {described(data)}"
    raise FileFormatError(
        f"{complaint}. If one of these is the weights by name, save that one alone with torch.save and load it"
    )


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items())
    )


def _unwrap(found: Weights, own: Collection[str]) -> None:
    """Take off what stands before every name, as often as it does."""
    while not any(key in own for key in found.state):
        for prefix in WRAPPERS:
            beside = BESIDE.get(prefix, ())
            inside = [key for key in found.state if key.startswith(prefix)]
            rest = [key for key in found.state if not key.startswith(prefix)]
            if inside and all(key in COUNTERS or key.startswith(beside) for key in rest):
                break
        else:
            return
        found.notes.append(f"took {prefix!r} off {len(inside)} names")
        if rest:
            found.notes.append(f"left out {len(rest)} tensors beside them, e.g. {rest[0]}")
        found.state = {key[len(prefix) :]: found.state[key] for key in inside}


def _separate_ema(found: Weights, own: Collection[str], what: str, averaged: bool) -> None:
    """Drop averaged weights that stand beside the others under ``ema_`` names (MMCV 1), or take them."""
    ema = {key: value for key, value in found.state.items() if key.startswith((EMA, "ema.")) and key not in own}
    plain = {key: value for key, value in found.state.items() if key not in ema}
    names = {EMA + key.replace(".", "_"): key for key in own or plain}
    ours = {names.get(key, key[len(EMA) :]): value for key, value in ema.items()}
    if averaged:
        if not ours:
            raise FileFormatError(f"{what} has no averaged (EMA) weights; load it without asking for them")
        found.state = {**plain, **ours}
        found.notes.append(f"took {len(ours)} averaged (EMA) weights")
    elif ema and plain:
        found.state = plain
        found.notes.append(f"left out {len(ema)} averaged (EMA) copies, e.g. {next(iter(ema))}")
    elif ema:
        if not own and not any("." in key for key in ours):
            raise FileFormatError(
                f"{what} holds only averaged (EMA) weights, whose names have lost their dots (e.g. {next(iter(ema))}): "
                "they cannot be restored without the model; give its config (--config)"
            )
        found.state = ours
        found.notes.append(f"took {len(ours)} averaged (EMA) weights: the file has no others")
