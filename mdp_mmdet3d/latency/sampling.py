"""Which operators and widths are worth measuring."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import product
from typing import Literal, get_args

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.latency.interpolation import Staircase
from mdp_mmdet3d.operators import OPERATORS, OperatorSignature
from mdp_mmdet3d.space.types import CostTerm, PruningSpace, Width, WidthSum, width_dimensions
from mdp_mmdet3d.sums import attainable_sums

EntryKey = tuple[OperatorSignature, tuple[int, ...]]
LAYOUT = 4
"""Counts that are no multiple of it leave the blocked layout of some runtime."""
Policy = Literal["grid", "sparse", "exact", "none"]


def sampled_widths(options: tuple[int, ...], count: int | None) -> tuple[int, ...]:
    """Choose about ``count`` of the options: always the smallest and the largest, the others evenly between.

    Args:
        options: Increasing counts.
        count: How many; None takes all.

    Returns:
        Increasing counts. A tie between two options goes to the smaller one.
    """
    if count is None or len(options) <= count:
        return options
    targets = [options[0] + (options[-1] - options[0]) * step / (count - 1) for step in range(count)]
    return tuple(sorted({min(options, key=lambda option: (abs(option - target), option)) for target in targets}))


def policy_entries(space: PruningSpace, policy: Policy) -> list[EntryKey]:
    """What is measured before any plan is known.

    Args:
        space: What may be pruned.
        policy: ``"grid"``: a few widths per role, the rest is interpolated; ``"sparse"``: the smallest and the
            largest width; ``"exact"``: every combination of options; ``"none"``: nothing.

    Raises:
        ValueError: The policy is none of these.
    """
    if policy not in get_args(Policy):
        raise ValueError(f"policy {policy!r} is unknown; use one of {', '.join(get_args(Policy))}")
    if policy == "none":
        return []
    return exact_entries(space) if policy == "exact" else grid_entries(space, sparse=policy == "sparse")


def grid_entries(space: PruningSpace, *, sparse: bool = False) -> list[EntryKey]:
    """Every signature of the space at a rectangular grid of a few widths per role.

    Args:
        space: What may be pruned.
        sparse: The corners alone: enough to start from where what a plan uses is measured afterwards.
    """
    axes: dict[OperatorSignature, list[set[int]]] = {}
    fixed: dict[OperatorSignature, list[set[int]]] = {}
    for term in space.frame_terms():
        operator = OPERATORS[term.signature.kind]
        axis = axes.setdefault(term.signature, [set() for _ in operator.roles])
        for values, role, width in zip(axis, operator.roles, term.widths, strict=True):
            options = width_options(space, width)
            values.update(sampled_widths(options, 2 if sparse else operator.samples_of(role)))
            values.discard(0)
        for values, width in zip(fixed.setdefault(term.signature, [set() for _ in operator.roles]), term.widths):
            if isinstance(width, int) and width % LAYOUT:
                values.add(width)  # nothing is interpolated between layouts
    return [
        (signature, widths)
        for signature, axis in axes.items()
        for widths in product(
            *(
                sorted({min(values), max(values), *odd} if sparse else values)
                for values, odd in zip(axis, fixed[signature], strict=True)
            )
        )
    ]


def check_interpolable(space: PruningSpace, stairs: Staircase) -> None:
    """Check, before anything is measured, that the widths between those that are measured can be interpolated.

    Raises:
        MdpError: Options of a dimension leave the runtime's layout; names it and the remedy.
    """
    for term in space.frame_terms():
        if term.signature.kind != stairs.kind:
            continue
        width = term.widths[0]
        between = width_options(space, width)[1:-1]
        if odd := [count for count in between if count % stairs.input_multiple]:
            names = width_dimensions(width)
            what = f"dimension {names[0]}"
            remedy = f"Let prune.channel_multiple be a multiple of {stairs.input_multiple}"
            if isinstance(width, WidthSum):
                what = f"the input of {term.name}, {' + '.join(names)},"
                remedy += f", or leave the parts alone: prune.freeze={list(names)}"
            raise MdpError(
                f"{what} of {space.model} may keep {odd[0]} channels: {stairs.remark}, so what it costs cannot be "
                f"interpolated. {remedy}"
            )


def exact_entries(space: PruningSpace) -> list[EntryKey]:
    """Every combination of options that some plan may use."""
    keys: dict[EntryKey, None] = {}
    for term in space.frame_terms():
        keys |= {(term.signature, counts): None for counts in attainable_counts(space, term)}
    return [key for key in keys if 0 not in key[1]]


def attainable_counts(space: PruningSpace, term: CostTerm) -> Iterable[tuple[int, ...]]:
    """Counts per role of a term over all options, in the order of its dimensions; a concatenation's are sums."""
    zeros = dict.fromkeys(term.dimensions, 0)
    base = term.counts(zeros)
    known: dict[tuple[int, ...], None] = {base: None}
    for name in term.dimensions:
        one = term.counts({**zeros, name: 1})
        steps = [after - before for after, before in zip(one, base, strict=True)]
        known = {
            tuple(count + option * step for count, step in zip(counts, steps, strict=True)): None
            for counts in known
            for option in space.by_name[name].options
        }
    return known


def entries_of(space: PruningSpace, widths: Mapping[str, int], removed: Collection[str]) -> list[EntryKey]:
    """The measurements that one structure uses, each once.

    Args:
        space: What may be pruned.
        widths: Kept count per dimension; one that is missing keeps its dense size.
        removed: Names of removed blocks.
    """
    keys = {(term.signature, term_widths(space, term, widths)): None for term in kept_terms(space, removed)}
    return [key for key in keys if 0 not in key[1]]


def kept_terms(space: PruningSpace, removed: Collection[str]) -> list[CostTerm]:
    """Terms that run every frame and lie in no removed block."""
    gone = frozenset(removed)
    return [term for term in space.frame_terms() if gone.isdisjoint(space.chain(term.block))]


def term_widths(space: PruningSpace, term: CostTerm, widths: Mapping[str, int]) -> tuple[int, ...]:
    """Counts per role of ``term``; a dimension that ``widths`` does not name keeps its dense size."""
    return term.counts({name: widths.get(name, space.by_name[name].size) for name in term.dimensions})


def width_options(space: PruningSpace, width: Width) -> tuple[int, ...]:
    """Counts that a width may have, increasing."""
    if isinstance(width, WidthSum):
        counts = [[times * option for option in space.by_name[name].options] for name, times in width.parts]
        return tuple(attainable_sums(*counts, fixed=width.fixed))
    return (width,) if isinstance(width, int) else space.by_name[width].options
