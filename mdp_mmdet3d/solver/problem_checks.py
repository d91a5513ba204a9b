"""What a `PruningProblem` is checked for when it is made."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mdp_mmdet3d.errors import MdpError

if TYPE_CHECKING:
    from mdp_mmdet3d.solver.problem import ProblemBlock, ProblemDimension, ProblemTerm


class InvalidProblemError(MdpError):
    """A `PruningProblem` breaks a rule of its format; the message names the term, dimension or block."""


def without_forbidden(term: ProblemTerm, allowed: np.ndarray, shape: tuple[int, ...]) -> ProblemTerm:
    """The term with 0 where it is not allowed, so that no number there decides about units or hashes."""

    def cleared(array: Any) -> Any:
        array = np.asarray(array)
        return np.where(allowed, array, 0) if array.shape == shape and array.dtype.kind in "biuf" else array

    costs = {metric: cleared(cost) for metric, cost in term.costs.items()}
    value = None if term.value is None else cleared(term.value)
    return replace(term, costs=costs, value=value, allowed=None if allowed.all() else allowed)


def check_names(kind: str, names: tuple[str, ...]) -> None:
    """Raise `InvalidProblemError` where a name is used twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidProblemError(f"{kind} {name!r} is named twice")
        seen.add(name)


def check_options(dimension: ProblemDimension) -> None:
    """Raise `InvalidProblemError` unless the options are increasing counts."""
    options = dimension.options
    falling = any(a >= b for a, b in itertools.pairwise(options))
    if not options or falling or options[0] < 0 or any(int(count) != count for count in options):
        raise InvalidProblemError(
            f"dimension {dimension.name!r} needs increasing counts >= 0 as options, got {list(options)}"
        )


def checked_array(array: Any, shape: tuple[int, ...], where: str, *, signed: bool = False) -> np.ndarray:
    """Finite numbers of this shape, not below 0 unless ``signed``; cannot be written. Raises `InvalidProblemError`."""
    try:
        result = np.array(array, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidProblemError(f"{where} is not an array of numbers: {error}") from error
    if result.shape != shape:
        raise InvalidProblemError(f"{where} has shape {result.shape}, its dimensions have {shape} options")
    if not np.isfinite(result).all():
        raise InvalidProblemError(f"{where} holds NaN or infinity")
    if not signed and (result < 0).any():
        raise InvalidProblemError(f"{where} holds the negative number {result.min():g}")
    result.flags.writeable = False
    return result


def checked_mask(array: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Booleans of this shape; cannot be written. Raises `InvalidProblemError`."""
    result = np.array(array)
    if result.dtype != np.bool_:
        raise InvalidProblemError(f"{where} must be boolean, got {result.dtype}")
    if result.shape != shape:
        raise InvalidProblemError(f"{where} has shape {result.shape}, its dimensions have {shape} options")
    result.flags.writeable = False
    return result


def block_chains(blocks: tuple[ProblemBlock, ...]) -> tuple[tuple[int, ...], ...]:
    """Per block, itself and its parents, innermost first."""
    chains = []
    for index, block in enumerate(blocks):
        chain = [index]
        parent = block.parent
        while parent is not None:
            if not 0 <= parent < len(blocks):
                raise InvalidProblemError(f"block {block.name!r} has parent {parent} of {len(blocks)} blocks")
            if parent in chain:
                raise InvalidProblemError(f"block {block.name!r} is its own ancestor")
            chain.append(parent)
            parent = blocks[parent].parent
        chains.append(tuple(chain))
    return tuple(chains)
