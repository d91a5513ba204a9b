"""The number of StreamPETR's learned queries as a dimension (``prune.queries``)."""

from __future__ import annotations

import math

from torch import nn

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.types import COMBINATIONS, GLOBAL_KINDS, OUTPUT, DimensionKind, TensorAxis
from projects.streampetr.head_terms import HEAD, open_queries

NAME = f"{HEAD}.queries"
POINTS = f"{HEAD}.reference_points"


def add_query_count(builder: SpaceBuilder, model: nn.Module) -> None:
    """Add the dimension and let the products of the head depend on it.

    Propagated queries stay: they are rows of the memory, whose length the host knows.

    Args:
        builder: Holds dimensions, blocks and terms of the whole detector.
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
        return
    builder.left_alone.pop(POINTS, None)
    open_queries(builder, model, builder.dimensions[name])


def least_queries(model: nn.Module) -> int:
    """Learned queries that the memory and post-processing need, at least 1.

    The memory takes the best ``topk_proposals`` of learned and propagated queries, post-processing the best ``max_num``
    pairs of query and class.
    """
    head = model.get_submodule(HEAD)
    for_boxes = -(-model.bbox_coder.max_num // head.num_classes)
    dense = head.reference_points.num_embeddings + head.num_propagated
    return max(1, max(head.topk_proposals, min(for_boxes, dense)) - head.num_propagated)
