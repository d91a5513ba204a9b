"""Distillation: while a pruned model is fine-tuned, its queries also learn what the dense model makes of theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmdet3d.registry import MODELS
from mmdet3d.structures import Det3DDataSample
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from mdp_mmdet3d.config_file import read_config, without_pretrained
from mdp_mmdet3d.errors import MdpError, StructureMismatchError

from .checkpoint import load_checkpoint
from .frame import frame_inputs
from .memory import MemoryState
from .sliding_window import WINDOW_KEY
from .train_loop import unwrapped


class QueryOutputs(NamedTuple):
    """What the decoder makes of the learned queries in one frame.

    Attributes:
        features: (levels, B, Q, C) post-normed.
        logits: (levels, B, Q, classes).
    """

    features: Tensor
    logits: Tensor


class QueryRecorder:
    """Listens to a StreamPETR and keeps the outputs of its learned queries, frame by frame.

    Args:
        model: The detector.
        wanted: Asked before every frame whether to keep it.
    """

    def __init__(self, model: nn.Module, wanted: Callable[[], bool]) -> None:
        head = model.pts_bbox_head
        learned, propagated = head.reference_points.num_embeddings, head.num_propagated
        self._features: list[Tensor] = []
        self._frames: list[QueryOutputs] = []

        def queries(values: Tensor) -> Tensor:
            # Denoising queries come before the learned ones, propagated ones behind them.
            end = values.shape[-2] - propagated
            return values[..., end - learned : end, :]

        # Plain functions: a copy of the model must not copy what they hold.
        def on_decoder(module: nn.Module, args: Any, levels: Sequence[Tensor]) -> None:
            if wanted():
                self._features.append(queries(torch.stack(list(levels))))

        def on_classes(module: nn.Module, args: Any, logits: Tensor) -> None:
            if wanted():
                self._frames.append(QueryOutputs(self._features.pop(), queries(logits)))

        self._handles = [
            head.transformer["decoder"].register_forward_hook(on_decoder),
            head.cls_branches[0].register_forward_hook(on_classes),
        ]

    def take(self) -> list[QueryOutputs]:
        """The frames since the last call."""
        frames, self._frames = self._frames, []
        return frames

    def close(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()


def decoder_layers(model: nn.Module) -> list[int]:
    """Indices of the decoder layers that a StreamPETR still has; each of them is a level of its outputs."""
    layers = model.pts_bbox_head.transformer["decoder"].layers
    return [i for i, layer in enumerate(layers) if not isinstance(layer, nn.Identity)]


def matching_levels(student: Sequence[int], teacher: Sequence[int]) -> list[int]:
    """The teacher's level that each level of the student learns from.

    Args:
        student: Decoder layers that the student has.
        teacher: Decoder layers that the teacher has.

    Returns:
        Per level of the student the teacher's level of the same layer (the one before where the teacher lacks it); for
        the last one the teacher's last, because both are what is detected.
    """
    levels = [max([level for level, layer in enumerate(teacher) if layer <= wanted], default=0) for wanted in student]
    return [*levels[:-1], len(teacher) - 1]


def distillation_losses(student: QueryOutputs, teacher: QueryOutputs, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """How far a student is from its teacher, 0 where both agree.

    A query counts by the teacher's best class probability in it, as nearly all queries are background.

    Args:
        student: Of one frame.
        teacher: Of the same frame.
        levels: See `matching_levels`.

    Returns:
        The Kullback-Leibler divergence of the class probabilities (sum over the classes, which are independent) and the
        mean squared difference of the features; weighted means over the queries and levels.
    """
    index = torch.tensor(levels, device=teacher.logits.device)
    target = teacher.logits.float()[index]
    probability = target.sigmoid()
    weight = probability.amax(dim=-1)
    weight = weight / weight.sum().clamp(min=1e-6)
    cross_entropy = F.binary_cross_entropy_with_logits(student.logits.float(), probability, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(target, probability, reduction="none")
    logits = ((cross_entropy - entropy).sum(dim=-1) * weight).sum()
    difference = student.features.float() - teacher.features.float()[index]
    return logits, (difference.square().mean(dim=-1) * weight).sum()


class Distillation:
    """Adds the distillation losses to those that a student returns in training.

    Only learned queries are compared: both models have the same ones, while the propagated queries of each are its own
    best detections. The teacher stays in evaluation mode (no dropout, no GridMask), gets no gradients and follows the
    student's streams with a memory of its own, which is empty whenever the student's is.

    Args:
        student: The detector that is trained, without DDP. The teacher never becomes part of it.
        teacher: The detector that is learned from.
        logits_weight: Factor of ``distill_loss_logits``.
        features_weight: Factor of ``distill_loss_features``.

    Raises:
        StructureMismatchError: Both detectors have different queries or classes.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, logits_weight: float = 1.0, features_weight: float = 1.0
    ) -> None:
        _check_heads(student.pts_bbox_head, teacher.pts_bbox_head)
        self.teacher = teacher.eval().requires_grad_(False)
        self.memory: MemoryState | None = None
        self.logits_weight = logits_weight
        self.features_weight = features_weight
        self.levels = matching_levels(decoder_layers(student), decoder_layers(teacher))
        self._student = QueryRecorder(student, lambda: student.training and torch.is_grad_enabled())
        self._teacher = QueryRecorder(teacher, lambda: True)

        def before(module: nn.Module, args: Any) -> None:
            if module.memory is None:
                self.memory = None

        def after(module: nn.Module, args: Any, kwargs: Mapping[str, Any], losses: Any) -> Any:
            if kwargs.get("mode") != "loss" or not module.training:
                return losses
            return {**losses, **self._losses(kwargs["inputs"]["imgs"], kwargs["data_samples"])}

        self._handles = [
            student.register_forward_pre_hook(before),
            student.register_forward_hook(after, with_kwargs=True),
        ]

    def close(self) -> None:
        """Leave the student as it was."""
        self._student.close()
        for handle in self._handles:
            handle.remove()

    def _losses(self, imgs: Tensor, samples: Sequence[Det3DDataSample]) -> dict[str, Tensor]:
        taught = self._teach(imgs, samples)
        with torch.autocast(imgs.device.type, enabled=False):
            pairs = [distillation_losses(own, theirs, self.levels) for own, theirs in zip(self._student.take(), taught)]
        logits, features = (torch.stack(values).mean() for values in zip(*pairs))
        return {
            "distill_loss_logits": self.logits_weight * logits,
            "distill_loss_features": self.features_weight * features,
        }

    @torch.no_grad()
    def _teach(self, imgs: Tensor, samples: Sequence[Det3DDataSample]) -> list[QueryOutputs]:
        """The teacher's outputs of the frames that have losses."""
        if WINDOW_KEY not in samples[0].metainfo:
            self.memory = self._step(imgs, samples, self.memory)
            return self._teacher.take()
        windows = [sample.metainfo[WINDOW_KEY] for sample in samples]
        memory = None
        for t, frame in enumerate(imgs.unflatten(1, (len(windows[0]), -1)).unbind(1)):
            memory = self._step(frame, [window[t] for window in windows], memory)
        return self._teacher.take()[-samples[0].metainfo["grad_frames"] :]

    def _step(self, imgs: Tensor, samples: Sequence[Det3DDataSample], memory: MemoryState | None) -> MemoryState:
        features = self.teacher.extract_img_feat(imgs)
        return self.teacher.run_frame(features, frame_inputs(samples, imgs), memory)[1]


def _check_heads(student: nn.Module, teacher: nn.Module) -> None:
    for name, read in {
        "learned queries": lambda head: head.reference_points.num_embeddings,
        "classes": lambda head: head.num_classes,
        "query channels": lambda head: head.embed_dims,
        "query positions": lambda head: head.pc_range.tolist(),
    }.items():
        if read(student) != read(teacher):
            raise StructureMismatchError(
                f"distillation: the teacher has {read(teacher)} {name}, the student {read(student)}; use the dense "
                "model that the student was pruned from, without prune.queries and prune.embed_width"
            )


@HOOKS.register_module()
class DistillationHook(Hook):
    """Distil a dense model into the one that is trained; see `Distillation`.

    The teacher is built when the training starts and is in no checkpoint; its memory is, through `StreamStateHook`, so
    that a resumed training goes on exactly.

    Args:
        teacher_config: Config file of the dense model.
        teacher_checkpoint: Its weights.
        logits_weight: Factor of the loss on class logits.
        features_weight: Factor of the loss on decoder features.

    Raises:
        MdpError: A weight is negative, or both are 0.
    """

    state_key = "distillation"

    def __init__(
        self,
        teacher_config: str,
        teacher_checkpoint: str,
        logits_weight: float = 1.0,
        features_weight: float = 1.0,
    ) -> None:
        if min(logits_weight, features_weight) < 0 or logits_weight == features_weight == 0:
            raise MdpError(
                f"distillation: logits_weight={logits_weight} and features_weight={features_weight} must not be "
                "negative, and one must be positive; leave the section out to train without a teacher"
            )
        self.teacher_config = teacher_config
        self.teacher_checkpoint = teacher_checkpoint
        self.weights = (logits_weight, features_weight)
        self.distillation: Distillation | None = None

    def before_train(self, runner: Runner) -> None:
        """Build the teacher.

        Raises:
            FileFormatError: Its checkpoint cannot be read.
            StructureMismatchError: It does not fit its config, or the teacher does not fit the student.
        """
        student = unwrapped(runner.model)
        teacher = MODELS.build(without_pretrained(read_config(self.teacher_config).model))
        load_checkpoint(teacher, self.teacher_checkpoint)
        teacher.to(next(student.parameters()).device)
        self.distillation = Distillation(student, teacher, *self.weights)
        runner.logger.info(f"distillation from {self.teacher_checkpoint}; teacher's levels {self.distillation.levels}")

    def after_train(self, runner: Runner) -> None:
        """Let go of the student."""
        if self.distillation is not None:
            self.distillation.close()

    def stream_memory(self) -> MemoryState | None:
        """The teacher's memory, for `StreamStateHook`."""
        return self.distillation.memory if self.distillation is not None else None

    def restore_stream_memory(self, memory: MemoryState | None) -> None:
        """Go on with what `stream_memory` returned."""
        if self.distillation is not None:
            self.distillation.memory = memory
