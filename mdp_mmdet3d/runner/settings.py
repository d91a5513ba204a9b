"""The ``prune`` section of a config: checked keys, budgets with units."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from mdp_mmdet3d.config_file import check_keys, check_types
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.space.builder import InputShape, SpaceOptions
from mdp_mmdet3d.surgery.repair import RepairSettings

PRECISIONS = ("float32", "float16")
IMPORTANCES = ("loss", "taylor")
RENAMED = {"calibration_networks": "fit_networks"}  # keys of version-1 configs
_BUDGET = re.compile(r"\s*((?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*(ms|fps|%)?\s*", re.IGNORECASE)


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
    """

    iterations: int
    lr: float = 1e-4
    warmup: int = 20
    seed: int = 0
    save_interval: int = 50

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> FinetuneSettings:
        """Read the section; raises `MdpError` on an unknown key (naming the nearest) or a bad value."""
        check_keys(section, [f.name for f in fields(cls)], "prune.finetune")
        if "iterations" not in section:
            raise MdpError("prune.finetune needs iterations, e.g. finetune=dict(iterations=300, lr=1e-4)")
        settings = cls(**section)
        for name, least in (("iterations", 1), ("warmup", 0), ("seed", 0), ("save_interval", 1)):
            value = getattr(settings, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise MdpError(f"prune.finetune.{name} = {value!r} must be a whole number of at least {least}")
        if not isinstance(settings.lr, (int, float)) or not 0 < settings.lr < 1:
            raise MdpError(f"prune.finetune.lr = {settings.lr!r} must lie between 0 and 1")
        return settings


@dataclass(frozen=True)
class LossSettings:
    """What ``prune = dict(importance=dict(type="loss", ...))`` of a config may hold besides the type.

    Attributes:
        frames: Batches on which every part is cut once; as many follow while the ranking is not stable.
        max_frames: Batches in all, at most.
        widths: Counts of a dimension that are measured, at most; those between are interpolated.
        corrections: How often the values are corrected by what the plan did to the loss, at most.
    """

    frames: int = 32
    max_frames: int = 128
    widths: int = 4
    corrections: int = 1

    @classmethod
    def from_config(cls, section: str | Mapping[str, Any]) -> LossSettings | None:
        """Read ``prune.importance``; None for ``"taylor"``. Raises `MdpError` where it is neither."""
        values = {"type": section} if isinstance(section, str) else dict(section)
        check_keys(values, ["type", *(f.name for f in fields(cls))], "prune.importance")
        kind = values.pop("type", None)
        if kind not in IMPORTANCES or (values and kind != "loss"):
            raise MdpError(
                f"prune.importance = {section!r} must be 'loss', 'taylor' or dict(type='loss', frames=32, ...)"
            )
        settings = cls(**values)
        for name, least in (("frames", 4), ("max_frames", 4), ("widths", 1), ("corrections", 0)):
            value = getattr(settings, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise MdpError(f"prune.importance: {name} = {value!r} must be a whole number of at least {least}")
        if settings.max_frames < settings.frames:
            raise MdpError(f"prune.importance: max_frames = {settings.max_frames} is below frames = {settings.frames}")
        return settings if kind == "loss" else None


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
        max_options: Counts per dimension at most.
        channel_multiple: Smallest step of channels and hidden widths.
        head_width_multiple: Step of the q/k and v width of a head.
        tie_head_widths: One number of channels for q/k and v of an attention, each its own best: what TensorRT's fused
            attention takes without padding.
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
        finetune: How to fine-tune the pruned model (keys of `FinetuneSettings`); None not to.
    """

    budget: float | str = 0.55
    frames: int = 16
    importance: str | Mapping[str, Any] = "loss"
    input_size: tuple[int, int] = (256, 704)
    num_cams: int = 0
    max_options: int = 8
    channel_multiple: int = 16
    head_width_multiple: int = 8
    tie_head_widths: bool = False
    min_keep: float = 0.0
    freeze: tuple[str, ...] = ()
    precision: str = "float32"
    sampling: Literal["sparse", "grid"] = "sparse"
    tolerance: float = 0.02
    refinements: int = 3
    rounds: int = 16
    fit_networks: int = 4
    time_limit_s: float = 300.0
    evaluate: bool = False
    repair: Mapping[str, Any] | bool = True
    finetune: Mapping[str, Any] | None = None
    adapter: Mapping[str, Any] | None = None

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> PruneSettings:
        """Read the section; raises `MdpError` on an unknown key (naming the nearest) or a bad value."""
        section = {RENAMED.get(key, key): value for key, value in section.items()}
        check_keys(section, [f.name for f in fields(cls)], "prune")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}
        settings = cls(**values)
        settings.check()
        return settings

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
        )

    @property
    def loss_values(self) -> LossSettings | None:
        """How to measure values in units of loss; None for first-order importance."""
        return LossSettings.from_config(self.importance)

    @property
    def finetuning(self) -> FinetuneSettings | None:
        """How to fine-tune, checked."""
        return None if self.finetune is None else FinetuneSettings.from_config(self.finetune)

    @property
    def repairing(self) -> RepairSettings | None:
        """How to repair, checked; None: not at all."""
        if self.repair is False:
            return None
        section = {} if self.repair is True else self.repair
        if not isinstance(section, Mapping):
            raise MdpError(f"prune.repair = {self.repair!r} must be True, False or a dict such as dict(frames=60)")
        check_keys(section, RepairSettings.keys(), "prune.repair")
        return RepairSettings.from_config(section)

    @property
    def input_shape(self) -> InputShape:
        """One frame at deployment."""
        return InputShape(self.num_cams, *self.input_size)

    def check(self) -> None:
        """Raise `MdpError` where a value makes no sense."""
        check_types(self, "prune")
        parse_budget(self.budget)
        if self.tolerance <= 0 or self.refinements < 0 or self.num_cams < 0:
            raise MdpError(
                f"prune.tolerance = {self.tolerance!r} must be positive, prune.refinements = {self.refinements!r} and "
                f"prune.num_cams = {self.num_cams!r} at least 0"
            )
        if not isinstance(self.evaluate, bool):
            raise MdpError(f"prune.evaluate = {self.evaluate!r} must be True or False")
        if self.finetune is not None and not isinstance(self.finetune, Mapping):
            raise MdpError(f"prune.finetune = {self.finetune!r} must be a dict such as dict(iterations=300, lr=1e-4)")
        if self.adapter is not None and (not isinstance(self.adapter, Mapping) or "type" not in self.adapter):
            raise MdpError(
                f"prune.adapter = {self.adapter!r} must be a dict with a type, e.g. dict(type='SingleGraph')"
            )
        if not isinstance(self.importance, (str, Mapping)):
            raise MdpError(f"prune.importance = {self.importance!r} must be 'loss', 'taylor' or a dict with a type")
        _ = self.loss_values, self.finetuning, self.repairing
        positive = ("frames", "max_options", "channel_multiple", "head_width_multiple", "time_limit_s")
        for name in positive:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
                raise MdpError(f"prune.{name} = {value!r} must be positive")
        for name in ("rounds", "fit_networks"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 2:
                raise MdpError(f"prune.{name} = {getattr(self, name)!r} must be a whole number of at least 2")
        if not 0 <= self.min_keep <= 1:
            raise MdpError(f"prune.min_keep = {self.min_keep!r} must lie in 0 ... 1")
        if len(self.input_size) != 2 or any(size <= 0 for size in self.input_size):
            raise MdpError(f"prune.input_size = {self.input_size!r} must be (height, width) in pixels")
        if self.sampling not in ("grid", "sparse"):
            raise MdpError(f"prune.sampling = {self.sampling!r} must be 'grid' or 'sparse'")
        if self.precision not in PRECISIONS:
            raise MdpError(f"prune.precision = {self.precision!r} must be one of {', '.join(PRECISIONS)}")
        if isinstance(self.freeze, str):
            raise MdpError(f"prune.freeze = {self.freeze!r} must be a list of patterns")


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
