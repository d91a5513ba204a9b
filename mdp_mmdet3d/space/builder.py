"""Collects dimensions, blocks and terms while adapters walk through a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.operators import OperatorSignature
from mdp_mmdet3d.space.types import (
    OUTPUT,
    SHORTCUT,
    Block,
    BlockKind,
    CostTerm,
    Dimension,
    DimensionKind,
    NotPrunable,
    PruningSpace,
    ScoreSource,
    TensorAxis,
    Unpriced,
    Width,
    WidthSum,
    width_dimensions,
)


@dataclass(frozen=True)
class SpaceOptions:
    """How finely and how deeply may be pruned.

    Attributes:
        max_options: Counts per dimension at most; the step grows with the dense count.
        channel_multiple: Smallest step of channels and hidden widths: the device's staircase (8, 16 or 32).
        head_width_multiple: Step of the q/k and v width of a head.
        tie_head_widths: One width for q/k and v of an attention, as TensorRT's fused kernel wants it.
        min_keep: Smallest share of a dimension that may stay.
        freeze: Shell patterns of dimension and block names that stay as they are.
        embed_width: Cut the embedding width of transformers too.
        queries: Cut the number of learned object queries too.
    """

    max_options: int = 8
    channel_multiple: int = 16
    head_width_multiple: int = 8
    min_keep: float = 0.0
    freeze: tuple[str, ...] = ()
    tie_head_widths: bool = False
    embed_width: bool = False
    queries: bool = False

    def counts(self, size: int, multiple: int, least: int = 1) -> tuple[int, ...]:
        """Allowed counts of a dimension: multiples of a step, at most `max_options`, the last is ``size``."""
        step = multiple
        while -(-size // step) > self.max_options:
            step *= 2
        smallest = max(least, round(self.min_keep * size))
        return (*(c for c in range(step, size, step) if c >= smallest), size)

    def matches(self, name: str) -> bool:
        """Whether ``freeze`` names a dimension or block."""
        return any(fnmatchcase(name, pattern) for pattern in self.freeze)


@dataclass(frozen=True)
class InputShape:
    """Shape of one frame at deployment.

    Attributes:
        num_cams: Camera images N; 0: as the adapter says.
        height: Pixels of the network image.
        width: Pixels of the network image.
        encoder_batch: Images that one run of the image encoder takes, 1 or N; 0: N.
    """

    num_cams: int
    height: int
    width: int
    encoder_batch: int = 0

    @property
    def encoder_runs(self) -> int:
        """How often the image encoder runs per frame."""
        return self.num_cams // (self.encoder_batch or self.num_cams)


class SpaceBuilder:
    """What adapters write to; `finish` checks it and makes the immutable `PruningSpace`."""

    def __init__(self, model: nn.Module, options: SpaceOptions, refused: Mapping[str, str] | None = None) -> None:
        self.model = model
        self.options = options
        self.refused = dict(refused or {})  # dimensions and blocks that a check found wrong, and why
        self.dimensions: dict[str, Dimension] = {}
        self.blocks: dict[str, Block] = {}
        self.terms: dict[str, CostTerm] = {}
        self.left_alone: dict[str, str] = {}
        self.unpriced: dict[tuple[str, str, str], int] = {}
        self._excluded: dict[str, str] = {}

    def add_block(
        self,
        name: str,
        kind: BlockKind,
        parent: str | None = None,
        *,
        last: str = "",
        stays: tuple[str, ...] = SHORTCUT,
    ) -> None:
        """Add a removable unit, parents first.

        Args:
            name: Path of the module that is replaced.
            kind: How it is replaced.
            parent: Block that contains it.
            last: Path within the block of the last affine operator of its branch; every kind but
                `BlockKind.LAYER` needs it.
            stays: For `BlockKind.RESIDUAL_BRANCH`: children that stay, in the order in which they are applied.

        Raises:
            MdpError: ``last`` or ``stays`` names nothing that the model has.
        """
        self._check_block(name, kind, last, stays)
        if self.options.matches(name) or name in self.refused:
            self.leave(name, self.refused.get(name, "frozen by the config"))
            return
        if parent is not None and parent not in self.blocks:
            parent = None
        self.blocks[name] = Block(name, kind, parent, last, stays)

    def _check_block(self, name: str, kind: BlockKind, last: str, stays: tuple[str, ...]) -> None:
        module = self.model.get_submodule(name)
        parts, children = dict(module.named_modules()), dict(module.named_children())
        if kind is not BlockKind.LAYER and getattr(parts.get(last), "weight", None) is None:
            raise MdpError(
                f"block {name!r} has no affine operator at last={last!r}: name the last one of its branch, with which "
                f"a {type(module).__name__} adds nothing once its weight and bias are 0"
            )
        missing = [child for child in stays if child not in children] if kind is BlockKind.RESIDUAL_BRANCH else []
        if missing:
            raise MdpError(f"block {name!r} has no child {missing[0]!r} that could stay; it has {', '.join(children)}")

    def block_of(self, path: str) -> str | None:
        """Innermost block that contains the module or tensor ``path``."""
        found = [b for b in self.blocks.values() if b.contains(path)]
        return max(found, key=lambda b: len(b.name)).name if found else None

    def add_dimension(
        self,
        name: str,
        kind: DimensionKind,
        size: int,
        members: Iterable[TensorAxis],
        sources: Iterable[Iterable[TensorAxis]],
        *,
        multiple: int | None = None,
        copies: int = 1,
        within: str | None = None,
        scale: float = 1.0,
        least: int = 1,
    ) -> str | int:
        """Add a dimension; returns its name, or the dense count if the user froze it.

        Args:
            name: Unique name.
            kind: What is counted.
            size: Dense count.
            members: Tensor axes that are sliced together.
            sources: Axis groups that are scored; each belongs to the block that contains its first tensor.
            multiple: Step of the options; `SpaceOptions.channel_multiple` if absent.
            copies: Independent rankings that share the count.
            within: Dimension that counts the copies.
            scale: Factor of every source.
            least: Smallest count that the model can do with.
        """
        counts = self.options.counts(size, multiple or self.options.channel_multiple, least)
        if self.options.matches(name) or len(counts) == 1:
            self.leave(name, "frozen by the config" if self.options.matches(name) else f"{size} is the smallest step")
            return size
        if name in self.refused:
            self.leave(name, self.refused[name])
            return size
        if name in self.dimensions:
            raise MdpError(f"dimension {name!r} is defined twice; an adapter is wrong")
        scored = tuple(ScoreSource(axes, self.block_of(axes[0].tensor), scale) for axes in map(tuple, sources))
        self.dimensions[name] = Dimension(name, kind, size, counts, tuple(members), scored, copies, within)
        return name

    def extend(self, name: Width, members: Iterable[TensorAxis]) -> None:
        """Add members to an existing dimension (a consumer found later); a frozen one is left alone.

        Raises:
            MdpError: It is a sum, which is cut in several places.
        """
        if isinstance(name, WidthSum):
            parts = ", ".join(part for part, _ in name.parts)
            raise MdpError(f"a consumer of the concatenation of {parts} has to be added to each part by itself")
        if isinstance(name, str):
            old = self.dimensions[name]
            self.dimensions[name] = replace(old, members=old.members + tuple(members))

    def width_of(self, tensor: str, axis: int, dense: int) -> Width:
        """How long an axis of a tensor is: a dimension, where it is that long; a sum; or the dense count."""
        found = [
            (member.offset, dimension, member)
            for dimension in self.dimensions.values()
            for member in dimension.members
            if member.tensor == tensor and member.axis == axis
        ]
        if not found:
            return dense
        parts: dict[str, int] = {}
        fixed = dense
        for _, dimension, member in sorted(found, key=lambda part: part[0]):  # in the order of the concatenation
            times = len(member.copies_here(dimension.copies)) * member.width
            parts[dimension.name] = parts.get(dimension.name, 0) + times
            fixed -= dimension.size * times
        _, first, member = found[0]
        alone = len(parts) == 1 and member.width == 1 and first.copies * first.size == dense
        if alone or fixed < 0:  # several dimensions of one attention cut the same axis
            return first.name
        return WidthSum(tuple(parts.items()), fixed)

    def add_term(
        self,
        name: str,
        engine: str,
        kind: str,
        widths: tuple[Width, ...],
        block: str | None = None,
        **attributes: int | float | str | bool,
    ) -> None:
        """Add an operator; one without any dimension and block is part of the fixed latency and is not stored.

        Raises:
            MdpError: A term of this name exists, or a width names no dimension.
        """
        block = block if block is not None else self.block_of(name)
        names = [name for width in widths for name in width_dimensions(width)]
        if block is None and not names:
            return
        unknown = [name for name in names if name not in self.dimensions]
        if unknown:
            raise MdpError(f"cost term {name!r} depends on {unknown[0]!r}, which is no dimension; an adapter is wrong")
        if name in self.terms:
            raise MdpError(f"cost term {name!r} is defined twice; an adapter is wrong")
        self.terms[name] = CostTerm(name, OperatorSignature.make(kind, **attributes), widths, block, engine)

    def without_term(self, engine: str, operator: str, reason: str) -> None:
        """Note an operator whose cost a plan changes and that has no term; ``operator`` is its class or function."""
        key = (engine, operator, reason)
        self.unpriced[key] = self.unpriced.get(key, 0) + 1

    def leave(self, module: str, reason: str) -> None:
        """Note what is not prunable and why; a dimension of this name is taken out, its terms keep the dense count."""
        self.left_alone[module] = reason
        dimension = self.dimensions.pop(module, None)
        if dimension is None:
            return
        for name, other in self.dimensions.items():
            if other.within == module:
                self.dimensions[name] = replace(other, within=None)
        for name, term in list(self.terms.items()):
            left = replace(term, widths=tuple(_with_dense(width, dimension) for width in term.widths))
            self.terms[name] = left
            if term.block is None and not left.dimensions:
                del self.terms[name]

    def exclude(self, module: str, reason: str) -> None:
        """Leave a module with everything in it: channels that touch it are left alone when they are traced."""
        self._excluded[module] = reason
        self.leave(module, reason)

    def excluded(self, path: str) -> str | None:
        """Why the module ``path`` is excluded, or None."""
        for module, reason in self._excluded.items():
            if f"{path}.".startswith(f"{module}."):
                return f"{module}: {reason}"
        return None

    def check_patterns(self) -> None:
        """Raise `MdpError` where a freeze pattern matches nothing that was found."""
        known = [*self.dimensions, *self.blocks, *self.left_alone]
        for pattern in self.options.freeze:
            if not any(SpaceOptions(freeze=(pattern,)).matches(name) for name in known):
                examples = f"; names look like {known[0]!r} and {known[-1]!r}" if known else ""
                raise MdpError(
                    f"prune.freeze pattern {pattern!r} matches no dimension and no block of "
                    f"{type(self.model).__name__}{examples}"
                )

    def finish(
        self,
        model_name: str,
        model_digest: str,
        once: tuple[str, ...] = (),
        repeated: Mapping[str, int] | None = None,
    ) -> PruningSpace:
        """Check members against the model's tensors and freeze everything.

        Args:
            model_name: Class name, for people.
            model_digest: Of the dense model.
            once: Engines that do not run every frame.
            repeated: How often an engine runs per frame, where it is more than once.

        Raises:
            MdpError: A dimension does not fit the model's tensors, or no cost term uses it.
        """
        tensors = self.model.state_dict(keep_vars=True)
        used = {name for term in self.terms.values() for name in term.dimensions}
        unused = [name for name in self.dimensions if name not in used]
        if unused:
            raise MdpError(
                f"no cost term uses {', '.join(map(repr, unused[:5]))}{' ...' if len(unused) > 5 else ''} "
                f"({len(unused)} of {len(self.dimensions)} dimensions): cutting it would seem to save nothing. Add the "
                "operators that it changes with SpaceBuilder.add_term, or take it out with "
                "SpaceBuilder.leave(name, reason)"
            )
        for dimension in self.dimensions.values():
            for member in dimension.members:
                if member.tensor.endswith(OUTPUT):
                    continue
                if member.tensor not in tensors:
                    raise MdpError(
                        f"{dimension.name!r} slices {member.tensor!r}, which is not in the model; an adapter is wrong"
                    )
                shape = tuple(tensors[member.tensor].shape)
                copies = len(member.copies_here(dimension.copies))
                end = member.offset + copies * dimension.size * member.width
                if end > shape[member.axis]:
                    raise MdpError(
                        f"{dimension.name!r} needs {end} entries along axis {member.axis} of "
                        f"{member.tensor!r}, which has shape {shape}; an adapter is wrong"
                    )
        more = tuple((engine, runs) for engine, runs in (repeated or {}).items() if runs != 1)
        return replace(self.snapshot(model_digest), model=model_name, once=once, repeated=more)

    def snapshot(self, model_digest: str) -> PruningSpace:
        """What was found so far, for cutting the model with it; its members are not checked."""
        return PruningSpace(
            model=type(self.model).__name__,
            model_digest=model_digest,
            dimensions=tuple(self.dimensions.values()),
            blocks=tuple(self.blocks.values()),
            terms=tuple(self.terms.values()),
            not_prunable=tuple(NotPrunable(m, r) for m, r in self.left_alone.items()),
            unpriced=tuple(Unpriced(*key, count) for key, count in self.unpriced.items()),
        )


def _with_dense(width: Width, dimension: Dimension) -> Width:
    """A width in which one dimension has its dense count for good."""
    if isinstance(width, WidthSum):
        times = dict(width.parts).get(dimension.name, 0)
        rest = tuple(part for part in width.parts if part[0] != dimension.name)
        fixed = width.fixed + times * dimension.size
        return WidthSum(rest, fixed) if rest else fixed
    return dimension.size if width == dimension.name else width
