"""Which operators and widths are worth measuring."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import product
from typing import Literal, get_args

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.latency.interpolation import Staircase
from mdp_mmdet3d.operators import OPERATORS, OperatorSignature
from mdp_mmdet3d.space import CostTerm, PruningSpace

EntryKey = tuple[OperatorSignature, tuple[int, ...]]
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
    for term in space.frame_terms():
        operator = OPERATORS[term.signature.kind]
        axis = axes.setdefault(term.signature, [set() for _ in operator.roles])
        for values, role, width in zip(axis, operator.roles, term.widths, strict=True):
            options = _options(space, width)
            values.update(sampled_widths(options, 2 if sparse else operator.samples_of(role)))
            values.discard(0)
    return [
        (signature, widths)
        for signature, axis in axes.items()
        for widths in product(*(sorted({min(values), max(values)} if sparse else values) for values in axis))
    ]


def check_interpolable(space: PruningSpace, stairs: Staircase) -> None:
    """Check, before anything is measured, that the widths between those that are measured can be interpolated.

    Raises:
        MdpError: Options of a dimension leave the runtime's layout; names it and the remedy.
    """
    for term in space.frame_terms():
        if term.signature.kind != stairs.kind:
            continue
        between = _options(space, term.widths[0])[1:-1]
        if odd := [count for count in between if count % stairs.input_multiple]:
            raise MdpError(
                f"dimension {term.widths[0]} of {space.model} may keep {odd[0]} channels: {stairs.remark}, so what it "
                f"costs cannot be interpolated. Let prune.channel_multiple be a multiple of {stairs.input_multiple}"
            )


def exact_entries(space: PruningSpace) -> list[EntryKey]:
    """Every combination of options that some plan may use."""
    keys: dict[EntryKey, None] = {}
    for term in space.frame_terms():
        names = term.dimensions
        for counts in product(*(space.by_name[name].options for name in names)):
            keys[term.signature, term_widths(space, term, dict(zip(names, counts, strict=True)))] = None
    return [key for key in keys if 0 not in key[1]]


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
    return tuple(
        width if isinstance(width, int) else widths.get(width, space.by_name[width].size) for width in term.widths
    )


def _options(space: PruningSpace, width: str | int) -> tuple[int, ...]:
    return (width,) if isinstance(width, int) else space.by_name[width].options
