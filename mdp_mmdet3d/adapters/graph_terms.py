"""All cost terms of one deployed graph: found by running it, at the shapes that it has where it is deployed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mdp_mmdet3d.adapters.call_terms import add_call_terms
from mdp_mmdet3d.adapters.cut_models import CutModels
from mdp_mmdet3d.adapters.deployed_graph import AtSize, DeployedGraph
from mdp_mmdet3d.adapters.network import add_network_terms
from mdp_mmdet3d.adapters.residual_blocks import ResidualBlock
from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.calls import Call
from mdp_mmdet3d.space.fpn import add_upsample_terms


def add_graph_terms(
    builder: SpaceBuilder,
    model: nn.Module,
    graph: DeployedGraph,
    calls: Sequence[Call],
    sizes: AtSize,
    blocks: Sequence[ResidualBlock] = (),
    priced: Sequence[str] = (),
    cut_models: CutModels | None = None,
) -> None:
    """Add the cost of convolutions, linear layers, feature pyramids and of every other call that a plan changes.

    Args:
        builder: Holds dimensions and blocks already.
        model: The dense model.
        graph: What is deployed of it.
        calls: `DeployedGraph.calls`.
        sizes: `DeployedGraph.at_size`.
        blocks: Residual blocks, whose last convolution is fused with the addition.
        priced: Paths of modules whose cost is in other terms.
        cut_models: Models with other widths, where several graphs share them.
    """
    recorded, shapes = graph.operations(model), sizes.shapes
    add_network_terms(builder, calls, shapes, blocks, graph.engine, recorded[0], priced)
    for name, module in model.named_modules():
        ran = any(path.startswith(f"{name}.lateral_convs.") for path in shapes)
        if ran and hasattr(module, "lateral_convs") and hasattr(module, "fpn_convs"):
            add_upsample_terms(builder, module, name, shapes, graph.engine)
    add_call_terms(builder, model, graph, recorded, sizes.operations, priced, cut_models)
