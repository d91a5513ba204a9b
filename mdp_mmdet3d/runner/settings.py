"""The ``prune`` section of a config: checked keys, budgets with units."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PlainValidator

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.report.provenance import DEFAULT_TOLERANCE
from mdp_mmdet3d.sections import Count, Flag, Natural, Number, Positive, Text, read_section
from mdp_mmdet3d.space.builder import InputShape, SpaceOptions
from mdp_mmdet3d.surgery.repair import RepairSettings

Precision = Literal["float32", "float16"]
PRECISIONS = get_args(Precision)
IMPORTANCES = ("loss", "taylor")
AUTO = "auto"
RENAMED = {"calibration_networks": "fit_networks"}  # keys of version-1 configs
_BUDGET = re.compile(r"\s*((?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*(ms|fps|%)?\s*", re.IGNORECASE)


def parse_budget(budget: float | str) -> tuple[float, str]:
    """Number and unit of a budget: ``"share"`` of the dense latency, ``"ms"`` or ``"fps"``.

    Raises:
        MdpError: It is none of these.
    """
    match = _BUDGET.fullmatch(str(budget))
    if not match or not 0 < float(match[1]) < float("inf"):
        raise MdpError(
            f"budget {budget!r} is not understood: give a share of the dense latency such as 0.55 or 55%, "
            "milliseconds such as 120ms, or frames per second such as 8fps"
        )
    unit = (match[2] or "share").lower()
    if unit == "%":
        return parse_budget(float(match[1]) / 100)
    if unit == "share" and float(match[1]) > 1:
        raise MdpError(
            f"budget {budget!r} is a share of the dense latency and must not exceed 1; "
            f"for milliseconds write {match[1]}ms"
        )
    return float(match[1]), unit


def budget_ms(budget: float | str, dense_ms: float) -> float:
    """Milliseconds per frame that a budget allows.

    Raises:
        MdpError: It is not understood, or not below the dense latency: there would be nothing to prune.
    """
    number, unit = parse_budget(budget)
    value = {"share": number * dense_ms, "ms": number, "fps": 1000.0 / number}[unit]
    if value >= dense_ms:
        raise MdpError(
            f"budget {budget!r} = {value:.1f} ms is not below the dense latency of {dense_ms:.1f} ms on "
            "this device: the dense model meets it already; give a smaller budget"
        )
    return value


@dataclass(frozen=True)
class FinetuneSettings:
    """What ``prune = dict(finetune=dict(...))`` of a config may hold.

    Attributes:
        iterations: Optimizer steps.
        lr: Learning rate of the optimizer; it rises to it linearly and falls to 0 along a cosine. A model that was
            trained from nothing loses what its attention has learned at the rate of its training's start.
        warmup: Steps of the rise.
        seed: Of data order and denoising noise.
        save_interval: Steps between checkpoints that an interrupted run goes on from.
        keep_statistics: Whether batch norms keep the statistics that they start with, and use them: those of a repaired
            model fit its weights better than those of the small batches of a short training.
    """

    iterations: Annotated[Count, Field(examples=["300"])]
    lr: Annotated[Positive, Field(lt=1)] = 1e-4
    warmup: Natural = 20
    seed: Natural = 0
    save_interval: Count = 50
    keep_statistics: Flag = False

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> FinetuneSettings:
        """Read the section; raises `MdpError` on an unknown key (naming the nearest) or a bad value."""
        return read_section(cls, section, "prune.finetune")


@dataclass(frozen=True)
class LossSettings:
    """What ``prune = dict(importance=dict(type="loss", ...))`` of a config may hold besides the type.

    Attributes:
        frames: Batches on which every part is cut once; as many follow while the ranking is not stable.
        max_frames: Batches in all, at most.
        widths: Counts of a dimension that are measured, at most; those between are interpolated.
        corrections: How often the values are corrected by what the plan did to the loss, at most.
    """

    frames: Annotated[Count, Field(ge=4)] = 32
    max_frames: Annotated[Count, Field(ge=4)] = 128
    widths: Count = 4
    corrections: Natural = 1

    @classmethod
    def from_config(cls, section: str | Mapping[str, Any]) -> LossSettings | None:
        """Read ``prune.importance``; None for ``"taylor"``. Raises `MdpError` where it is neither."""
        values = dict(section) if isinstance(section, Mapping) else {"type": section}
        kind = values.pop("type", None)
        if kind not in IMPORTANCES or (values and kind != "loss"):
            raise MdpError(
                f"prune.importance = {section!r} must be 'loss', 'taylor' or dict(type='loss', frames=32, ...)"
            )
        settings = read_section(cls, values, "prune.importance")
        if settings.max_frames < settings.frames:
            raise MdpError(f"prune.importance: max_frames = {settings.max_frames} is below frames = {settings.frames}")
        return settings if kind == "loss" else None


def _repairing(section: Mapping[str, Any] | bool) -> RepairSettings | None:
    if isinstance(section, bool):
        return RepairSettings() if section else None
    if not isinstance(section, Mapping):
        raise MdpError(f"prune.repair = {section!r} must be True, False or a dict such as dict(frames=60)")
    return RepairSettings.from_config(section)


def _finetuning(section: Mapping[str, Any] | str | None) -> FinetuneSettings | None:
    if isinstance(section, str) and section != AUTO:
        raise MdpError(f"prune.finetune = {section!r} must be 'auto', a dict such as dict(iterations=300), or None")
    return None if section is None or isinstance(section, str) else FinetuneSettings.from_config(section)


def _check_adapter(section: Mapping[str, Any] | None) -> None:
    if section is not None and not (isinstance(section, Mapping) and "type" in section):
        raise MdpError(f"prune.adapter = {section!r} must be a dict with a type, e.g. dict(type='SingleGraph')")


def _parsed(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A value that stays as it was given if ``parse`` takes it."""

    def check(value: Any) -> Any:
        parse(value)
        return value

    return check


@dataclass(frozen=True)
class PruneSettings:
    """What ``prune = dict(...)`` of a config may hold.

    Attributes:
        budget: Share of the dense latency (0.55), ``"120ms"`` or ``"8fps"``.
        frames: Frames of the importance data loader to use for first-order importance, which ranks the elements of a
            dimension whatever ``importance`` says.
        importance: What a part is worth: ``"loss"``, what the loss does without it (keys of `LossSettings` beside
            ``type`` in a dict), or ``"taylor"``, its first-order importance as in the paper. With random weights, which
            have nothing to lose, it is always the latter.
        input_size: Height and width in pixels of the network image at deployment.
        num_cams: Camera images of a frame; 0: as the adapter says (6 for StreamPETR, else 1).
        encoder_batch: Camera images that one run of the image encoder takes, for a streaming model: 1 prices, measures
            and exports an encoder of one camera, which runs once per camera and frame; 0: all at once.
        max_options: Counts per dimension at most.
        channel_multiple: Smallest step of channels and hidden widths.
        head_width_multiple: Step of the q/k and v width of a head.
        tie_head_widths: One number of channels for q/k and v of an attention, each its own best: what TensorRT's fused
            attention takes without padding.
        embed_width: Cut the embedding width of transformers too: it changes the shapes of everything in them.
        queries: Cut the number of learned object queries too (StreamPETR): the shapes of what the head gives change.
        min_keep: Smallest share of a dimension that may stay.
        precision: In which the model will run: ``"float32"``, or ``"float16"`` with a latency table of the target.
        freeze: Shell patterns of dimensions and blocks that stay as they are.
        sampling: ``"sparse"`` measures the smallest and largest widths of an operator before solving, ``"grid"`` some
            between as well, for more exact predictions of plans that are not measured; what the plan uses is measured
            in either case.
        tolerance: Largest relative distance of the measured latency from the budget before the prediction is
            corrected by the plan and the program is solved again.
        refinements: How often that may happen.
        rounds: Timed rounds of an end-to-end measurement.
        fit_networks: Whole networks that the latency model is fitted to, the dense one included.
        time_limit_s: Limit of one solve.
        evaluate: Whether to evaluate the dense and the pruned model, and the fine-tuned one.
        adapter: Adapter of the model and its arguments, ``dict(type=...)``; None looks for one by the model's class.
        repair: How to refit what is left of the dense weights to what the dense model computes (keys of
            `RepairSettings`, all of which have defaults); True with the defaults, False not to.
        finetune: How to fine-tune the pruned model (keys of `FinetuneSettings`); ``"auto"``: iterations by the share
            that was cut and the number of training samples, the rate by that of training; None not to.
    """

    budget: Annotated[float | str, PlainValidator(_parsed(parse_budget))] = 0.55
    frames: Count = 16
    importance: Annotated[str | Mapping[str, Any], PlainValidator(_parsed(LossSettings.from_config))] = "loss"
    input_size: Annotated[tuple[Count, Count], Field(examples=["(256, 704)"])] = (256, 704)
    num_cams: Natural = 0
    encoder_batch: Natural = 0
    max_options: Count = 8
    channel_multiple: Count = 16
    head_width_multiple: Count = 8
    tie_head_widths: Flag = False
    embed_width: Flag = False
    queries: Flag = False
    min_keep: Annotated[Number, Field(ge=0, le=1)] = 0.0
    freeze: Annotated[tuple[Text, ...], Field(examples=["['backbone.*']"])] = ()
    precision: Precision = "float32"
    sampling: Literal["sparse", "grid"] = "sparse"
    tolerance: Positive = DEFAULT_TOLERANCE
    refinements: Natural = 3
    rounds: Annotated[Count, Field(ge=2)] = 16
    fit_networks: Annotated[Count, Field(ge=2)] = 4
    time_limit_s: Positive = 300.0
    evaluate: Flag = False
    repair: Annotated[Mapping[str, Any] | bool, PlainValidator(_parsed(_repairing))] = True
    finetune: Annotated[Mapping[str, Any] | str | None, PlainValidator(_parsed(_finetuning))] = None
    adapter: Annotated[Mapping[str, Any] | None, PlainValidator(_parsed(_check_adapter))] = None

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> PruneSettings:
        """Read the section; raises `MdpError` on an unknown key (naming the nearest) or a bad value."""
        if isinstance(section, Mapping):
            section = {RENAMED.get(key, key): value for key, value in section.items()}
        return read_section(cls, section, "prune")

    @property
    def space_options(self) -> SpaceOptions:
        """How finely and deeply may be pruned."""
        return SpaceOptions(
            self.max_options,
            self.channel_multiple,
            self.head_width_multiple,
            self.min_keep,
            tuple(self.freeze),
            self.tie_head_widths,
            self.embed_width,
            self.queries,
        )

    @property
    def loss_values(self) -> LossSettings | None:
        """How to measure values in units of loss; None for first-order importance."""
        return LossSettings.from_config(self.importance)

    @property
    def finetuning(self) -> FinetuneSettings | None:
        """How to fine-tune, checked; None: not at all, or as `runner.finetune_length.finetuning_of` finds."""
        return _finetuning(self.finetune)

    @property
    def repairing(self) -> RepairSettings | None:
        """How to repair, checked; None: not at all."""
        return _repairing(self.repair)

    @property
    def input_shape(self) -> InputShape:
        """One frame at deployment."""
        return InputShape(self.num_cams, *self.input_size, self.encoder_batch)

    def check(self) -> None:
        """Raise `MdpError` where a value makes no sense."""
        read_section(type(self), vars(self), "prune")
