"""Loading of StreamPETR checkpoints: safe, strict, and from the official and the AWML code base.

The names of this implementation are the official ones. What a public file has beyond or short of them is
handled here: an auxiliary head that inference does not need, constants, and counters of frozen batch norms.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mdp_mmdet3d.checkpoint.load import check_meta, check_structure
from mdp_mmdet3d.checkpoint.read import read_checkpoint
from mdp_mmdet3d.checkpoint.weights import check_finite
from mdp_mmdet3d.errors import FileFormatError, StructureMismatchError

logger = logging.getLogger(__name__)

AUXILIARY_HEAD = ("img_roi_head.", "img_roi_head_")
"""As it is, and as MMCV 1 writes averaged weights, whose dots only the model's own names bring back."""
CONSTANTS = (
    "pts_bbox_head.code_weights",
    "pts_bbox_head.match_costs",
    "pts_bbox_head.pc_range",
    "pts_bbox_head.position_range",
    "pts_bbox_head.coords_d",
)
BACKBONE = "img_backbone."
CLASS_BRANCH = "pts_bbox_head.cls_branches."
ALIASED_BRANCHES = (CLASS_BRANCH, "pts_bbox_head.reg_branches.")

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


def load_checkpoint(model: nn.Module, path: str | Path) -> LoadReport:
    """Load an official or converted checkpoint strictly into a StreamPETR.

    Args:
        model: A :class:`~projects.streampetr.detector.StreamPETR`.
        path: The checkpoint.

    Raises:
        FileFormatError: See :func:`read_checkpoint`.
        StructureMismatchError: The checkpoint is that of another model or plan, or was trained with another ``eps``.
    """
    checkpoint = read_checkpoint(path, model.state_dict())
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
    check_structure(state, own, what, ", or tools/convert_checkpoint.py for an AWML file")
    check_finite(state, what)
    _check_branches(state, what)
    for key in CONSTANTS:
        # A file in half precision holds them rounded: they are compared so, and the model keeps its own.
        rounding = 2 * torch.finfo(state[key].dtype).eps if state[key].is_floating_point() else 0.0
        if not torch.allclose(state[key].to(own[key]), own[key], rtol=max(1e-4, rounding), atol=1e-6):
            raise StructureMismatchError(
                f"{what}: {key} is {state[key].tolist()}, the model's config says {own[key].tolist()}; use "
                "the config that the checkpoint was trained with"
            )
    state |= {key: own[key] for key in CONSTANTS}
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


def fold_colour_order(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for images in the other colour order: the input channels of the first convolution, reversed.

    Exact where mean and standard deviation belong to the same colours in both, as those of ImageNet do.

    Raises:
        StructureMismatchError: The image backbone has no convolution with three input channels.
    """
    first = next((k for k, v in state.items() if k.startswith(BACKBONE) and v.dim() == 4 and v.shape[1] == 3), None)
    if first is None:
        raise StructureMismatchError(f"no convolution of {BACKBONE[:-1]} takes three channels")
    return {**state, first: state[first].flip(1)}


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
