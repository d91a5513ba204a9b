"""Loading of StreamPETR checkpoints: safe, strict, and from the official and the AWML code base.

The names of this implementation are the official ones. What a public file has beyond or short of them is
handled here: an auxiliary head that inference does not need, constants, and counters of frozen batch norms.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdp_mmdet3d.engine.checkpoint_check import described, meta_of
from mdp_mmdet3d.engine.plan_hook import check_meta
from mdp_mmdet3d.engine.safe_loading import register_safe_globals
from mdp_mmdet3d.errors import FileFormatError, StructureMismatchError

logger = logging.getLogger(__name__)
register_safe_globals()

AUXILIARY_HEAD = "img_roi_head."
CONSTANTS = (
    "pts_bbox_head.code_weights",
    "pts_bbox_head.match_costs",
    "pts_bbox_head.pc_range",
    "pts_bbox_head.position_range",
    "pts_bbox_head.coords_d",
)
CLASS_BRANCH = "pts_bbox_head.cls_branches."
ALIASED_BRANCHES = (CLASS_BRANCH, "pts_bbox_head.reg_branches.")
WRAPPER_PREFIXES = ("module.", "model.")

OFFICIAL_CLASSES = (
    "car", "truck", "construction_vehicle", "bus", "trailer",
    "barrier", "motorcycle", "bicycle", "pedestrian", "traffic_cone",
)  # fmt: skip
AWML_CLASSES = (
    "car", "truck", "trailer", "bus", "construction_vehicle",
    "bicycle", "motorcycle", "pedestrian", "traffic_cone", "barrier",
)  # fmt: skip
OFFICIAL_EPS, AWML_EPS = 1e-5, 1e-4


@dataclass(frozen=True)
class LoadReport:
    """What loading did beyond copying tensors.

    Attributes:
        dropped: Keys of the auxiliary head that the model does not have.
        filled: Constants and counters that the file lacks and the model kept.
    """

    dropped: tuple[str, ...]
    filled: tuple[str, ...]


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


def load_checkpoint(model: nn.Module, path: str | Path) -> LoadReport:
    """Load an official or converted checkpoint strictly into a StreamPETR.

    Args:
        model: A :class:`~projects.streampetr.detector.StreamPETR`.
        path: The checkpoint.

    Raises:
        FileFormatError: See :func:`read_checkpoint`.
        StructureMismatchError: The checkpoint is that of another model or plan, or was trained with another ``eps``.
    """
    checkpoint = read_checkpoint(path)
    eps = checkpoint["meta"].get("streampetr_eps")
    if eps is not None and not isinstance(eps, (int, float)):
        raise FileFormatError(f"checkpoint {path}: its meta.streampetr_eps is {eps!r}, not a number")
    if eps is not None and eps != model.pts_bbox_head.eps:
        raise StructureMismatchError(
            f"checkpoint {path} was trained with eps={eps:g}, the model has {model.pts_bbox_head.eps:g}: set "
            f"model.pts_bbox_head.eps={eps:g} in the config"
        )
    plan = getattr(model, "mdp_plan", None)
    if plan is not None:
        check_meta(checkpoint["meta"], plan, f"checkpoint {path}")
    return load_state_dict(model, checkpoint["state_dict"], what=str(path))


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor], what: str = "state dict") -> LoadReport:
    """Load a state dict with official names strictly.

    Args:
        model: A StreamPETR.
        state: Names to tensors.
        what: How errors call it.

    Raises:
        StructureMismatchError: Keys or shapes differ, the shared branches do not agree, or a constant differs
            from the model's.
    """
    own = model.state_dict()
    state = dict(state)
    dropped = tuple(key for key in state if key.startswith(AUXILIARY_HEAD) and key not in own)
    for key in dropped:
        del state[key]
    optional = [key for key in own if key in CONSTANTS or key.endswith(".num_batches_tracked")]
    filled = tuple(key for key in optional if key not in state)
    state |= {key: own[key] for key in filled}
    _check_structure(state, own, what)
    _check_branches(state, what)
    for key in CONSTANTS:
        if not torch.allclose(state[key].to(own[key]), own[key], rtol=1e-4, atol=1e-6):
            raise StructureMismatchError(
                f"{what}: {key} is {state[key].tolist()}, the model's config says {own[key].tolist()}; use "
                "the config that the checkpoint was trained with"
            )
    model.load_state_dict(state, strict=True)
    if dropped:
        logger.info("%s: left out %d tensors of the auxiliary 2D head (training only)", what, len(dropped))
    if filled:
        logger.info("%s: kept %d constants and counters of the model that it lacks", what, len(filled))
    return LoadReport(dropped, filled)


def convert_awml(
    state: Mapping[str, Tensor],
    source_classes: Sequence[str] = AWML_CLASSES,
    target_classes: Sequence[str] = OFFICIAL_CLASSES,
) -> dict[str, Tensor]:
    """Rename AWML's keys and bring its class logits into another class order.

    Args:
        state: AWML's state dict.
        source_classes: Classes in the order of its logits.
        target_classes: The same classes in the wanted order.

    Raises:
        StructureMismatchError: The classes differ, or their number is not that of the logits.
    """
    if sorted(source_classes) != sorted(target_classes):
        raise StructureMismatchError(
            f"source classes {sorted(source_classes)} are not the target's, {sorted(target_classes)}"
        )
    order = [list(source_classes).index(name) for name in target_classes]
    converted = {}
    for key, value in state.items():
        if key == "pts_bbox_head.pseudo_reference_points":
            key += ".weight"
        if key.startswith(CLASS_BRANCH) and key.split(".")[3] == "6":
            if len(value) != len(order):
                raise StructureMismatchError(
                    f"{key} has {len(value)} rows, not {len(order)}; name the classes of the source"
                )
            value = value[order]
        converted[key] = value
    return converted


def _check_state_dict(state: Any, complaint: str) -> None:
    """Raise `FileFormatError`, with what is there, unless ``state`` is tensors by name."""
    if not isinstance(state, Mapping):
        raise FileFormatError(f"{complaint}: it is a {type(state).__name__}")
    if not state or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise FileFormatError(
            f"{complaint}: it holds {described(state)}. If one of these is the weights by name, save that one alone "
            "with torch.save and load it"
        )


def _check_structure(state: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str) -> None:
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
            "Use the config it was trained with, or tools/convert_checkpoint.py for an AWML file"
        )


def _check_branches(state: Mapping[str, Tensor], what: str) -> None:
    for prefix in ALIASED_BRANCHES:
        for key, value in state.items():
            if not key.startswith(prefix):
                continue
            first = prefix + "0." + key.removeprefix(prefix).split(".", 1)[1]
            if not torch.equal(value, state[first]):
                raise StructureMismatchError(
                    f"{what}: {key} differs from {first}, but one branch serves all levels; the checkpoint "
                    "comes from a model with separate branches"
                )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
