"""The adapter: everything that the line needs to know about one kind of model."""

from __future__ import annotations

import copy
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, TASK_UTILS, init_default_scope
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mdp_mmdet3d.adapters.deploy_options import DeployOptions
from mdp_mmdet3d.checkpoint.load import load_checkpoint
from mdp_mmdet3d.config_file import without_pretrained
from mdp_mmdet3d.datasets.identity import data_identity
from mdp_mmdet3d.datasets.spread import spread_batches
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import file_sha256
from mdp_mmdet3d.importance.batch_loss import model_loss
from mdp_mmdet3d.runtime.manifest import Manifest
from mdp_mmdet3d.space.builder import InputShape, SpaceBuilder, SpaceOptions
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.apply import model_digest
from mdp_mmdet3d.surgery.repair import Frame, WeightedFrame

RANDOM = "random"
HOW_TO = "docs/how-to/new-architecture.md"

A = TypeVar("A", bound="type[Adapter]")


class Adapter(ABC):
    """What one kind of model is built from, what of it may be pruned, its data, its deployment.

    Subclasses are registered with `register_adapter` and found by the class of the model (`models`), or named in the
    config: ``prune=dict(adapter=dict(type="MyAdapter", ...))``. Further keys of that dictionary go to the constructor.
    The defaults suit a model whose ``forward(mode="loss")`` takes what its data preprocessor returns.

    Args:
        config: MMEngine config with ``model``; empty where only a model is traced.
        shape: One frame at deployment.

    Attributes:
        models: Names of the classes of models that it is for; subclasses of them are meant too.
        once: Engines that do not run every frame: their terms cost nothing per frame.
        training_only: Prefixes of parameters that are not deployed.
        refused: Dimensions and blocks that a check of this object found wrong, with the reason.
        headline: Names, without prefix, of the metrics that stand for accuracy; all that the evaluator returns if
            empty. Larger is better.
        supervision: Patterns of loss terms that only guide training (levels before the last one, denoising): they say
            nothing about what is deployed.
        default_cams: Camera images of a frame where the config does not tell.
        embed_widths: Whether the embedding width of its transformers can be cut (`SpaceOptions.embed_width`).
        object_queries: Whether its number of learned object queries can be cut (`SpaceOptions.queries`).
        camera_by_camera: Whether an engine can be exported that runs once per camera (`InputShape.encoder_batch`).
    """

    models: ClassVar[tuple[str, ...]] = ()
    once: ClassVar[tuple[str, ...]] = ()
    training_only: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[tuple[str, ...]] = ()
    supervision: ClassVar[tuple[str, ...]] = ("d[0-9]*.*", "enc_*", "dn_*", "*.dn_*")
    default_cams: ClassVar[int] = 1
    camera_by_camera: ClassVar[bool] = False
    embed_widths: ClassVar[bool] = False
    object_queries: ClassVar[bool] = False

    def __init__(self, config: Config, shape: InputShape) -> None:
        self.config = config
        self.shape = shape if shape.num_cams else replace(shape, num_cams=self.default_cams)
        batch, cams = self.shape.encoder_batch, self.shape.num_cams
        if batch not in ((0, 1, cams) if self.camera_by_camera else (0, cams)):
            able = (
                f"must be 1 or all {cams}" if self.camera_by_camera else "is for a streaming model of several cameras"
            )
            raise MdpError(f"prune.encoder_batch = {batch} {able}; 0 runs all camera images at once")
        self.refused: dict[str, str] = {}

    # what the model is built from

    def build(self, checkpoint: str | None, seed: int = 0) -> tuple[nn.Module, str]:
        """The dense model in evaluation mode, and the identity of its weights.

        Args:
            checkpoint: Weights to load; without them the model is initialised at random from ``seed``.
            seed: For random weights: equal seeds give equal weights, so that steps can be reused.

        Returns:
            The model, and ``"random"`` or ``"<file name>@<first 16 hex digits of its SHA-256>"``.

        Raises:
            FileFormatError: The checkpoint is missing or damaged.
            StructureMismatchError: It is that of another model.
        """
        init_default_scope(self.config.get("default_scope", "mmdet3d"))
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - MMEngine's initialisers may draw from it
        content = copy.deepcopy(without_pretrained(self.config.model))
        if self.config.get("data_preprocessor") is not None:  # as MMEngine's Runner does: MMPretrain's lies outside
            content.setdefault("data_preprocessor", copy.deepcopy(self.config.data_preprocessor))
        model = MODELS.build(content)
        if checkpoint:
            self.load(model, checkpoint)
            return model.eval(), f"{Path(checkpoint).name}@{file_sha256(Path(checkpoint))[:16]}"
        model.init_weights()
        return model.eval(), RANDOM

    def load(self, model: nn.Module, path: str) -> None:
        """Load weights strictly into a dense or pruned model; raises as `build` does."""
        load_checkpoint(model, path)

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the score columns; empty if the config does not tell."""
        config = self.config
        return tuple(config.get("class_names") or (config.get("metainfo") or {}).get("classes") or ())

    # what may be pruned

    @abstractmethod
    def add_to_space(self, builder: SpaceBuilder, model: nn.Module) -> None:
        """Add the dimensions, blocks and cost terms of a dense model."""

    def trace(self, model: nn.Module, options: SpaceOptions | None = None) -> PruningSpace:
        """Find what may be pruned in a dense model; the model is left as it was.

        Args:
            model: The dense model.
            options: How finely and deeply may be pruned.

        Raises:
            MdpError: The model cannot be traced, a freeze pattern matches nothing, or the embedding width or number of
                queries of such a model cannot be cut.
        """
        return self.finished(self.collect(model, options or SpaceOptions()))

    def collect(self, model: nn.Module, options: SpaceOptions) -> SpaceBuilder:
        """What `add_to_space` finds; raises as `trace`."""
        for option, wanted, able, what in (
            ("embed_width", options.embed_width, self.embed_widths, "the width of its stream is"),
            ("queries", options.queries, self.object_queries, "object queries are"),
        ):
            if wanted and not able:
                raise MdpError(
                    f"prune.{option}=True is not for a {type(model).__name__}: its adapter {type(self).__name__} does "
                    f"not say how {what} cut. Leave it out"
                )
        builder = SpaceBuilder(model, options, self.refused)
        level = logging.root.manager.disable
        try:
            logging.disable(logging.WARNING)  # torch-pruning warns about parameters that it does not handle
            self.add_to_space(builder, model)
        finally:
            logging.disable(level)
        builder.check_patterns()
        return builder

    def finished(self, builder: SpaceBuilder) -> PruningSpace:
        """The space of what was collected; raises as `SpaceBuilder.finish`."""
        model = builder.model
        return builder.finish(type(model).__name__, model_digest(model), self.once, self.repeated)

    @property
    def repeated(self) -> dict[str, int]:
        """How often an engine runs per frame, where it is more than once."""
        return {}

    # data

    def loader(self) -> Mapping[str, Any]:
        """Data loader with ground truth that importance and frames come from: ``importance_dataloader``, or else
        ``train_dataloader``.

        Raises:
            MdpError: The config has neither.
        """
        for key in ("importance_dataloader", "train_dataloader"):
            if self.config.get(key) is not None:
                return self.config[key]
        raise MdpError(
            "the config has no importance_dataloader and no train_dataloader: define one with ground truth, for "
            "StreamPETR by inheriting configs/_base_/datasets/nuscenes_704x256.py"
        )

    def data_identity(self) -> str:
        """Identity of `loader`'s data: the digest of its info file, so that other data at the same path are others."""
        loader = self.config.get("importance_dataloader") or self.config.get("train_dataloader") or {}
        return data_identity(loader.get("dataset") or {})

    def importance_batches(self) -> Iterator[Mapping[str, Any]]:
        """Batches with ground truth, in stream order; raises as `importance_loader`."""
        return iter(self.importance_loader())

    def importance_loader(self) -> DataLoader:
        """`loader`, built.

        Raises:
            MissingDatasetError: The data is not there.
            MdpError: The data set cannot be opened.
        """
        try:
            return Runner.build_dataloader(copy.deepcopy(self.loader()), seed=0)
        except MdpError:
            raise
        except Exception as error:  # whatever a data set raises where its files are not what it expects
            kind = self.loader().get("dataset", {}).get("type")
            raise MdpError(
                f"the data set of the importance data ({kind}) cannot be opened: {type(error).__name__}: {error}"
            ) from error

    def losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The scalar that importance differentiates."""
        return model_loss(model, batch)

    def deployed_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The scalar whose change is what a part is worth: the loss without `supervision`.

        Where a level is removed, the last one that is left counts.
        """
        return model_loss(model, batch, self.supervision)

    def calibration_frames(self, model: nn.Module, count: int, stride: int = 1) -> list[Frame]:
        """Unlabelled frames of the importance data as functions that run one batch through a dense or pruned model.

        Equal calls give equal frames. A model with a memory is given the dense model's, so that both can be compared.

        Args:
            model: The dense model in evaluation mode.
            count: Frames wanted; fewer where the data has no more.
            stride: Every so manyth frame of a stream is used.

        Raises:
            MdpError: There is no data.
        """
        frames: list[Frame] = []
        found = 0
        for batch in self.calibration_batches(count, stride):
            data = model.data_preprocessor(dict(batch), False)
            frame = partial(_tensor_mode, data)
            weights = self.prediction_weights(model, frame)
            frames.append(frame if weights is None else WeightedFrame(frame, weights))
            found += len(data["data_samples"]) if data.get("data_samples") else 1
            if found >= count:
                break
        return frames

    def prediction_weights(self, model: nn.Module, frame: Frame) -> Tensor | None:
        """What each prediction of the dense model counts in repair (`WeightedFrame`); None: all alike."""
        return None

    def calibration_batches(self, count: int, stride: int = 1) -> Iterator[Mapping[str, Any]]:
        """Batches that repair sees, the same ones, augmentation included, each time.

        They are spread over the data (`spread_pieces`); where a subclass has its own `importance_batches`, its first
        ones. Streams come one behind the other, frame by frame; several processes share them where there are enough.

        Args:
            count: Items wanted in all processes together, at least.
            stride: Every so manyth item of a stream counts; those between are there as well.
        """
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - pipelines draw from it
        random.seed(0)
        if type(self).importance_batches is not Adapter.importance_batches:  # there may be no loader
            return self.importance_batches()
        return spread_batches(self.importance_loader(), count, stride)

    @abstractmethod
    def frames(self, model: nn.Module, count: int) -> list[Any]:
        """Frames as the deployed model takes them, of the importance data.

        Raises:
            MdpError: There is no data.
        """

    # deployment

    @abstractmethod
    def export(
        self,
        model: nn.Module,
        folder: Path,
        *,
        plan_hash: str | None,
        weights: str,
        on_engine: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        """Write a dense or pruned model as a deployment folder with ``deployment.json``; complete or not at all.

        Args:
            model: In float32.
            folder: Folder to write.
            plan_hash: Hash of the pruning plan, None for a dense model.
            weights: Where the weights came from.
            on_engine: Called with the name of each engine before it is exported.
            **options: Further ones of this kind of model.

        Raises:
            DeploymentError: The model cannot be exported.
        """

    def is_deployed_so(self, manifest: Manifest) -> bool:
        """Whether a deployment has the engines that `export` makes for `shape`."""
        return True

    @abstractmethod
    def compare(self, model: nn.Module, folder: Path, frames: Sequence[Any]) -> dict[str, float]:
        """Largest absolute differences between a model and its deployment over ``frames``, by what is compared."""

    @abstractmethod
    def deploy(
        self,
        model: nn.Module,
        folder: Path,
        options: DeployOptions,
        *,
        plan_hash: str | None,
        weights: str,
        say: Callable[[str], None],
    ) -> str:
        """Export as ``tools/export.py`` does: compared with PyTorch, in reduced precision, evaluated where asked for.

        Args:
            model: Dense or pruned, in float32.
            folder: Deployment folder to write.
            options: What is asked for.
            plan_hash: Hash of the pruning plan, None for a dense model.
            weights: Where the weights came from.
            say: Receives a line per result.

        Returns:
            The files of the folder, for people.

        Raises:
            DeploymentError: The model cannot be deployed so.
            MdpError: An option does not fit this kind of model.
        """


def _tensor_mode(data: Mapping[str, Any], model: nn.Module) -> Any:
    return model(**data, mode="tensor")


def register_adapter(adapter: A) -> A:
    """Class decorator: register an `Adapter` in MMEngine's ``TASK_UTILS``.

    Raises:
        MdpError: It leaves out a method that has no default.
    """
    if missing := sorted(getattr(adapter, "__abstractmethods__", ())):
        raise MdpError(
            f"adapter {adapter.__name__} leaves out {', '.join(missing)}, which have no default; see {HOW_TO}"
        )
    TASK_UTILS.register_module(module=adapter)
    return adapter


def registered_adapters() -> list[type[Adapter]]:
    """All of them, in the order of registration."""
    return [
        found for found in TASK_UTILS.module_dict.values() if isinstance(found, type) and issubclass(found, Adapter)
    ]
