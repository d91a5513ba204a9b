"""What may be pruned: dimensions, blocks, cost terms. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from mdp_mmdet3d.files import digest, read_json, write_json
from mdp_mmdet3d.operators import OperatorSignature

SCHEMA_VERSION = 1


class DimensionKind(str, Enum):
    """What a dimension counts."""

    CHANNELS = "channels"
    HEADS = "heads"
    QK_WIDTH = "qk_width"
    V_WIDTH = "v_width"
    HEAD_WIDTH = "head_width"  # of q, k and v alike
    HIDDEN = "hidden"
    EMBED_WIDTH = "embed_width"  # of the stream that the sub-layers of a transformer read and add to
    QUERIES = "queries"  # learned object queries of a decoder


GLOBAL_KINDS = frozenset({DimensionKind.EMBED_WIDTH, DimensionKind.QUERIES})
"""What most terms of a transformer depend on: the program is solved for each of their options by itself."""

COMBINATIONS = 64
"""Of the options of all dimensions of `GLOBAL_KINDS`, at most."""


class BlockKind(str, Enum):
    """How a removed block is replaced."""

    IDENTITY = "identity"  # output = input
    RESIDUAL_BRANCH = "residual_branch"  # output = activation(shortcut(input))
    SUB_LAYER = "sub_layer"  # residual branch of a post-norm sub-layer; its norm stays
    LAYER = "layer"  # a whole decoder or encoder layer: output = input
    BRANCH = "branch"  # what its caller adds to a stream: output = 0


# What stays of a residual branch unless its block says otherwise: shortcut, then activation.
SHORTCUT = ("downsample", "relu")


OUTPUT = "()"
"""Behind a module's path: what the module returns, where no tensor of the model says how wide that is: a position
embedding that it computes from nothing, a layer norm without weights."""


@dataclass(frozen=True)
class TensorAxis:
    """Where the elements of a dimension lie in one tensor.

    Element ``e`` of copy ``first + c`` covers the indices ``offset + (c * size + e) * width + [0, width)`` of ``axis``.

    Attributes:
        tensor: Path of the parameter or buffer, e.g. ``"img_backbone.layer1.0.bn1.weight"``; a module's path and
            `OUTPUT` for what that module returns.
        axis: Axis of that tensor.
        offset: Index of the first element.
        width: Consecutive indices per element (the head dimension for attention heads, else 1).
        first: First copy of the dimension that lies here.
        copies: How many do; None: all from ``first`` on.
    """

    tensor: str
    axis: int
    offset: int = 0
    width: int = 1
    first: int = 0
    copies: int | None = None

    def copies_here(self, copies: int) -> range:
        """Which of a dimension's ``copies`` lie here."""
        return range(self.first, copies if self.copies is None else self.first + self.copies)


@dataclass(frozen=True)
class ScoreSource:
    """Tensors whose first-order Taylor terms are added up before the absolute value is taken.

    Attributes:
        axes: The rows or columns that make up one element, e.g. gamma and beta of a BatchNorm; the gates of a
            `layers.gated.GatedEmbedding` under its path and `OUTPUT`.
        block: Block that loses this value when it is removed.
        scale: Factor; 0.5 where the same gate is seen from both sides (q and k rows, v rows and output columns).
    """

    axes: tuple[TensorAxis, ...]
    block: str | None
    scale: float = 1.0


@dataclass(frozen=True)
class Dimension:
    """A count that pruning may choose.

    Attributes:
        name: Unique, the path of the module that owns it, e.g. ``"img_backbone.layer2.1.conv1.out"``.
        kind: What is counted.
        size: Dense count.
        options: Allowed counts, increasing, the last equal to ``size``.
        members: Tensor axes that are sliced together.
        sources: Where the importance of its elements comes from.
        copies: Independent rankings that share one count (the heads of an attention for its q/k and v width).
        within: Dimension that counts the copies: the heads, for q/k and v width. A width of both has two copies per
            head, first those of q/k of all heads, then those of v.
    """

    name: str
    kind: DimensionKind
    size: int
    options: tuple[int, ...]
    members: tuple[TensorAxis, ...]
    sources: tuple[ScoreSource, ...]
    copies: int = 1
    within: str | None = None


@dataclass(frozen=True)
class Block:
    """A unit that can be removed as a whole.

    Attributes:
        name: Unique; the path of the module that is replaced.
        kind: How it is replaced.
        parent: Block that contains this one; removed with it.
        last: Path within the block of the last affine operator of its branch: with weight and bias 0 the block adds
            nothing. Empty for a `BlockKind.LAYER`, which is masked by replacing it, and in files that do not say.
        stays: Children that stay when a `BlockKind.RESIDUAL_BRANCH` is removed, applied one after the other; no other
            kind leaves anything.
    """

    name: str
    kind: BlockKind
    parent: str | None = None
    last: str = ""
    stays: tuple[str, ...] = SHORTCUT

    def contains(self, path: str) -> bool:
        """Whether removing the block removes the module or tensor ``path``; what `stays` is not removed."""
        inside = path == self.name or path.startswith(f"{self.name}.")
        return inside and not (
            self.kind is BlockKind.RESIDUAL_BRANCH
            and any(f"{path}.".startswith(f"{self.name}.{child}.") for child in self.stays)
        )


@dataclass(frozen=True)
class WidthSum:
    """A count that follows from dimensions, such as the input of a layer that reads a concatenation.

    It is ``fixed + sum(times * count of the dimension)``.

    Attributes:
        parts: Dimensions, each once, and how many channels one of its elements is.
        fixed: Count that is always there.
    """

    parts: tuple[tuple[str, int], ...]
    fixed: int = 0


Width = str | int | WidthSum


def width_at(width: Width, counts: Mapping[str, int]) -> int:
    """A width where the dimensions have ``counts``.

    Raises:
        KeyError: ``counts`` lacks a dimension.
    """
    if isinstance(width, WidthSum):
        return width.fixed + sum(times * counts[name] for name, times in width.parts)
    return counts[width] if isinstance(width, str) else width


def width_dimensions(width: Width) -> tuple[str, ...]:
    """Names of the dimensions that a width depends on."""
    if isinstance(width, WidthSum):
        return tuple(name for name, _ in width.parts)
    return (width,) if isinstance(width, str) else ()


@dataclass(frozen=True)
class CostTerm:
    """One operator whose latency depends on dimensions.

    Attributes:
        name: Unique; path of the module, plus a suffix where it runs more than once.
        signature: What is measured.
        widths: Per role of the signature's kind, a dimension's name, a sum of dimensions or a fixed count.
        block: Innermost block it lives in.
        engine: Engine it runs in: ``"image_encoder"``, ``"position_embedding"`` or ``"head"``.
    """

    name: str
    signature: OperatorSignature
    widths: tuple[Width, ...]
    block: str | None
    engine: str

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Distinct dimensions in the order of first use: the axes of the term's cost array."""
        return tuple(dict.fromkeys(name for width in self.widths for name in width_dimensions(width)))

    def counts(self, chosen: Mapping[str, int]) -> tuple[int, ...]:
        """Count per role where the dimensions have the ``chosen`` counts."""
        return tuple(width_at(width, chosen) for width in self.widths)


def cost_axes(term: CostTerm, sums: Collection[WidthSum] = ()) -> tuple[str | WidthSum, ...]:
    """Axes of a term's cost array where the widths in ``sums`` stand for the dimensions of their parts."""
    axes: dict[str | WidthSum, None] = {}
    for width in term.widths:
        if isinstance(width, WidthSum) and width in sums:
            axes[width] = None
        else:
            axes |= dict.fromkeys(width_dimensions(width))
    return tuple(axes)


@dataclass(frozen=True)
class NotPrunable:
    """A module that stays as it is, and why."""

    module: str
    reason: str


@dataclass(frozen=True)
class Unpriced:
    """Operators whose latency depends on the choice and that no cost term stands for.

    Attributes:
        engine: Engine they run in.
        operator: Class of the module, or PyTorch function.
        reason: Why they have no term.
        count: How many of them run.
    """

    engine: str
    operator: str
    reason: str
    count: int


@dataclass(frozen=True)
class PruningSpace:
    """Everything that may be pruned in one model.

    Attributes:
        model: Class name and config name, for people.
        model_digest: Digest of the dense model's state-dict names and shapes.
        dimensions: Counts to choose.
        blocks: Removable units, parents before children.
        terms: Operators whose latency depends on the choice.
        not_prunable: What is left alone and why.
        once: Engines that do not run every frame (position embedding): their terms cost nothing per frame.
        unpriced: Operators without a cost term.
        repeated: Engines that run more than once per frame, and how often (an image encoder of one camera): a term is
            what one run costs.
    """

    model: str
    model_digest: str
    dimensions: tuple[Dimension, ...]
    blocks: tuple[Block, ...]
    terms: tuple[CostTerm, ...]
    not_prunable: tuple[NotPrunable, ...] = ()
    once: tuple[str, ...] = ("position_embedding",)
    unpriced: tuple[Unpriced, ...] = ()
    repeated: tuple[tuple[str, int], ...] = ()

    def runs(self, engine: str) -> int:
        """How often an engine that is not `once` runs per frame."""
        return dict(self.repeated).get(engine, 1)

    @cached_property
    def by_name(self) -> dict[str, Dimension]:
        """Dimensions by name."""
        return {dimension.name: dimension for dimension in self.dimensions}

    @cached_property
    def blocks_by_name(self) -> dict[str, Block]:
        """Blocks by name."""
        return {block.name: block for block in self.blocks}

    def chain(self, block: str | None) -> tuple[str, ...]:
        """``block`` and all its parents, innermost first."""
        names = []
        while block is not None:
            names.append(block)
            block = self.blocks_by_name[block].parent
        return tuple(names)

    def frame_terms(self) -> tuple[CostTerm, ...]:
        """Terms that run every frame."""
        return tuple(term for term in self.terms if term.engine not in self.once)

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        from mdp_mmdet3d.space.files import to_dict

        write_json(path, to_dict(self))

    @classmethod
    def load(cls, path: str | Path) -> PruningSpace:
        """Read what `save` wrote; raises `FileFormatError`."""
        from mdp_mmdet3d.space.files import from_dict

        return from_dict(read_json(path, what="pruning space", schema_version=SCHEMA_VERSION), path)

    def describe(self) -> str:
        """The space as readable text: dimensions, blocks, terms, and what is left alone and why."""
        from mdp_mmdet3d.space.describe import describe

        return describe(self)

    @cached_property
    def hash(self) -> str:
        """Digest of the whole space, but for how blocks are masked and what has no term, which change no plan."""
        from mdp_mmdet3d.space.files import to_dict

        data = to_dict(self)
        data.pop("unpriced", None)
        for block in data["blocks"]:
            block.pop("last", None)
        return digest(data)


def axis_to_json(axis: TensorAxis) -> list[Any]:
    """JSON form, the arguments of `TensorAxis`; copies appear where not all lie there."""
    partial = [] if (axis.first, axis.copies) == (0, None) else [axis.first, axis.copies]
    return [axis.tensor, axis.axis, axis.offset, axis.width, *partial]
