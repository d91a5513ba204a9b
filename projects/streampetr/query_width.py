"""The width of StreamPETR's queries, image tokens and memory as a dimension (``prune.embed_width``)."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from mdp_mmdet3d.operators import OperatorSignature
from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.flow import follow_channels
from mdp_mmdet3d.space.streams import add_embed_widths
from mdp_mmdet3d.space.types import CostTerm
from projects.streampetr.head_terms import HEAD, LAYERS, SMALL, run_head

ENGINES = ("head", "position_embedding")
READERS = {"attention": "attn.in_proj_weight", "ffn": "layers.0.0.weight"}
"""Weight of a sub-layer whose columns read the queries."""


def add_query_width(builder: SpaceBuilder, model: nn.Module) -> None:
    """Add the dimension and let the products of the head depend on it.

    Everything that queries, tokens and memory rows pass is cut together: projections, norms, position, time and motion
    embeddings, branches. The sinusoids keep their sizes: linear layers read them.

    Args:
        builder: Holds dimensions, blocks and terms of the whole detector.
        model: The dense detector.
    """
    small = run_head(model, SMALL)
    readers = [n for n, _ in model.named_parameters() if n.startswith(LAYERS) and n.endswith(READERS["attention"])]
    before = set(builder.dimensions)
    add_embed_widths(builder, follow_channels(model, lambda: small(model)), [(name, 1) for name in readers])
    added = set(builder.dimensions) - before
    if not added:
        return
    for module in ("embed_dims", "time_embedding"):
        builder.left_alone.pop(f"{HEAD}.{module}", None)
    for name, term in builder.terms.items():
        if term.engine in ENGINES:
            builder.terms[name] = _on_stream(builder, term)
    head = model.get_submodule(HEAD)
    if memory := head.memory_len:  # the learned queries' ages are 0: constant
        path = f"{HEAD}.time_embedding"
        linear = head.time_embedding[0]
        widths = (linear.in_features, builder.width_of(f"{path}.0.weight", 0, linear.out_features))
        builder.add_term(f"{path}.0", "head", "linear", widths, tokens=memory, norm="none", activation="none")


def _on_stream(builder: SpaceBuilder, term: CostTerm) -> CostTerm:
    """The term with the widths that the new dimension changes."""
    kind, attributes = term.signature.kind, dict(term.signature.attributes)
    if kind == "linear":
        weight = builder.model.get_submodule(term.name).weight
        sides = zip(term.widths, (1, 0), strict=True)
        widths = tuple(
            builder.width_of(f"{term.name}.weight", axis, weight.shape[axis]) if isinstance(width, int) else width
            for width, axis in sides
        )
        return replace(term, widths=widths)
    if kind in READERS:
        stream = builder.width_of(f"{term.name}.{READERS[kind]}", 1, int(attributes.pop("embed_dims")))
        signature = OperatorSignature.make(f"stream_{kind}", **attributes)
        return replace(term, signature=signature, widths=(*term.widths, stream))
    return term
