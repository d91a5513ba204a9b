"""The training loss of one batch in evaluation mode, by MMEngine's conventions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from mdp_mmdet3d.errors import MdpError

STRIDE = 32  # of the coarsest features of most networks
SIZES = ("sizes of tensors must match", "must match the size of tensor")
PADDING = (
    f"Are the images' sizes no multiple of the network's strides? Pad them: model.data_preprocessor.pad_size_divisor="
    f"{STRIDE}, or resize them in the pipeline of the importance data"
)
DATA = "Does the importance data have the annotations that this model is trained with?"


def model_loss(model: nn.Module, batch: Mapping[str, Any], leave_out: Sequence[str] = ()) -> Tensor:
    """The loss of one batch without the terms that ``leave_out`` (patterns) names.

    Augmentations of whole batches (mixup, CutMix) are not applied, as the batch stands for what is deployed; the soft
    labels that the loss of such a training wants are those of images that were not mixed.

    Raises:
        MdpError: The model cannot compute it: the module, what it said, the images' sizes, what may help.
    """
    try:
        data = model.data_preprocessor(dict(batch), False)
        _soften(data)
        losses = model(**data, mode="loss")
        kept = {name: loss for name, loss in losses.items() if not any(fnmatchcase(name, p) for p in leave_out)}
        loss: Tensor = model.parse_losses(kept)[0]
    except MdpError:
        raise
    except Exception as error:  # whatever a foreign model raises, the user needs to know where and on what
        said = str(error).strip().splitlines()
        remedy = PADDING if any(words in str(error).lower() for words in SIZES) else DATA
        raise MdpError(
            f"the loss of {type(model).__name__} cannot be computed on the importance data (images of "
            f"{', '.join(_sizes(batch)) or 'unknown size'}): {type(error).__name__} in {_where(model, error)}: "
            f"{said[0].rstrip('.') if said else 'no message'}. {remedy}"
        ) from error
    return loss


def _soften(data: Mapping[str, Any]) -> None:
    """Make one-hot labels floating-point numbers, as MMPretrain's batch augmentations do where they mix nothing."""
    for sample in _samples(data):
        score = getattr(sample, "gt_score", None)
        if isinstance(score, Tensor) and not score.is_floating_point():
            sample.gt_score = score.float()


def _samples(data: Mapping[str, Any]) -> Sequence[Any]:
    samples = data.get("data_samples")
    return samples if isinstance(samples, (list, tuple)) else ()


def _sizes(batch: Mapping[str, Any]) -> list[str]:
    """``"214 x 320"`` of every size of image in a batch as the data loader gives it."""
    return sorted({f"{image.shape[-2]} x {image.shape[-1]}" for image in _images(batch.get("inputs"))})


def _images(inputs: Any) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        if inputs.ndim >= 3:
            yield inputs
    elif isinstance(inputs, Mapping):
        yield from _images(inputs.get("img", inputs.get("imgs")))
    elif isinstance(inputs, (list, tuple)):
        for item in inputs:
            yield from _images(item)


def _where(model: nn.Module, error: BaseException) -> str:
    """The innermost module of a model in which an error was raised."""
    names = {id(module): name for name, module in model.named_modules() if name}
    found, trace = "", error.__traceback__
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return repr(found) if found else type(model).__name__
