"""The number of StreamPETR's learned queries as a dimension (``prune.queries``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.operators import OPERATORS, OperatorSignature
from mdp_mmdet3d.operators.opened import with_queries
from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.types import (
    COMBINATIONS,
    GLOBAL_KINDS,
    OUTPUT,
    CostTerm,
    Dimension,
    DimensionKind,
    TensorAxis,
    WidthSum,
)
from mdp_mmdet3d.surgery.apply import apply_plan, model_digest, shared_copy
from mdp_mmdet3d.surgery.plan import Cut, PruningPlan
from projects.streampetr.head_runs import HEAD, HeadRuns

NAME = f"{HEAD}.queries"
POINTS = f"{HEAD}.reference_points"


def add_query_count(builder: SpaceBuilder, model: nn.Module) -> Dimension | None:
    """Add the dimension; returns it, or None where it is frozen.

    Propagated queries stay: they are rows of the memory, whose length the host knows.

    Args:
        builder: Holds the other dimensions of the whole detector.
        model: The dense detector.

    Raises:
        MdpError: Every learned query is needed.
    """
    head = model.get_submodule(HEAD)
    size, least = head.reference_points.num_embeddings, least_queries(model)
    combinations = math.prod(len(d.options) for d in builder.dimensions.values() if d.kind in GLOBAL_KINDS)
    most = max(2, min(builder.options.max_options, COMBINATIONS // combinations))
    step = builder.options.channel_multiple
    multiple = step * max(1, -(-size // (step * most)))
    if len(builder.options.counts(size, multiple, least)) == 1 and not builder.options.matches(NAME):
        raise MdpError(
            f"prune.queries=True: the {size} learned queries of this {type(model).__name__} cannot be fewer in steps "
            f"of {multiple} (prune.channel_multiple): at least {least} are needed, as the memory takes "
            f"{head.topk_proposals} of them and the {head.num_propagated} propagated ones, post-processing the best "
            f"{model.bbox_coder.max_num} (query, class) pairs, and prune.min_keep is {builder.options.min_keep:g}. "
            "Leave it out"
        )
    name = builder.add_dimension(
        NAME,
        DimensionKind.QUERIES,
        size,
        [TensorAxis(f"{POINTS}.weight", 0)],
        [[TensorAxis(f"{POINTS}{OUTPUT}", 0)]],
        multiple=multiple,
        least=least,
    )
    if not isinstance(name, str):
        return None
    builder.left_alone.pop(POINTS, None)
    return builder.dimensions[name]


def least_queries(model: nn.Module) -> int:
    """Learned queries that the memory and post-processing need, at least 1.

    The memory takes the best ``topk_proposals`` of learned and propagated queries, post-processing the best ``max_num``
    pairs of query and class.
    """
    head = model.get_submodule(HEAD)
    for_boxes = -(-model.bbox_coder.max_num // head.num_classes)
    dense = head.reference_points.num_embeddings + head.num_propagated
    return max(1, max(head.topk_proposals, min(for_boxes, dense)) - head.num_propagated)


def open_queries(builder: SpaceBuilder, model: nn.Module, dimension: Dimension, runs: HeadRuns) -> None:
    """Let the terms of everything that runs on as many rows as there are queries depend on their number.

    Which ones these are is seen by running the head with one query less.

    Args:
        builder: Holds all terms of products, attentions and feed-forward networks.
        model: The dense model.
        dimension: The number of learned queries.
        runs: Of a small frame.
    """
    terms = {
        name: term
        for name, term in builder.terms.items()
        if term.engine == "head" and with_queries(term.signature.kind) in OPERATORS
    }
    cut = Cut(dimension.kind, dimension.size, (tuple(range(dimension.size - 1)),), dimension.members)
    fewer = apply_plan(shared_copy(model), PruningPlan(model_digest(model), {dimension.name: cut}, {}))
    dense, less = _rows(model, runs, terms), _rows(fewer, runs, terms)
    for name, term in terms.items():
        if name in dense and dense[name] == less[name] + 1:
            builder.terms[name] = _of_queries(term, dimension)


def _of_queries(term: CostTerm, dimension: Dimension) -> CostTerm:
    attributes = dict(term.signature.attributes)
    counted = "queries" if "queries" in attributes else "tokens"
    rows = int(attributes.pop(counted))
    if attributes.get("shared"):
        attributes["keys"] = int(attributes["keys"]) - rows
    signature = OperatorSignature.make(with_queries(term.signature.kind), **attributes)
    return replace(
        term, signature=signature, widths=(*term.widths, WidthSum(((dimension.name, 1),), rows - dimension.size))
    )


def _rows(model: nn.Module, runs: HeadRuns, names: Collection[str]) -> dict[str, int]:
    """Rows of what each module is given in its last call: an earlier one may be on constants, which export folds."""
    found: dict[str, int] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = args[0].shape[-2]

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(note(name)) for name in names if name in modules]
    try:
        with torch.no_grad():
            runs.head(model)
    finally:
        for handle in handles:
            handle.remove()
    return found
