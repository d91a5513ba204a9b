"""Cost terms of what depends on the embedding width and the number of queries of StreamPETR's head."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mdp_mmdet3d.adapters.call_terms import add_call_terms
from mdp_mmdet3d.operators import OperatorSignature
from mdp_mmdet3d.operators.opened import with_queries
from mdp_mmdet3d.space.builder import InputShape, SpaceBuilder
from mdp_mmdet3d.space.types import CostTerm, Dimension, WidthSum
from mdp_mmdet3d.surgery.apply import apply_plan, model_digest, shared_copy
from mdp_mmdet3d.surgery.plan import Cut, PruningPlan

HEAD = "pts_bbox_head"
LAYERS = f"{HEAD}.transformer.decoder.layers"
SMALL = (1, 2, 3)
"""Cameras, rows and columns of tokens of a frame to look at shapes with."""

Run = Callable[[nn.Module], Any]


def run_head(model: nn.Module, maps: tuple[int, int, int]) -> Run:
    """A function that runs a frame of noise through the head of a model, dense or cut, as its graph is deployed.

    Args:
        model: The dense model.
        maps: Cameras, rows and columns of tokens.
    """
    cameras, rows, columns = maps
    head = model.get_submodule(HEAD)
    generator = torch.Generator().manual_seed(0)
    channels = head.memory_embed[0].in_features
    features = torch.randn(1, cameras, channels, rows, columns, generator=generator).to(head.pc_range)
    pose = torch.eye(4).to(head.pc_range)[None]
    rig = pose[0].expand(1, cameras, 4, 4)

    def run(model: nn.Module) -> Any:
        head = model.get_submodule(HEAD)
        position = head.position_embedding((rows * head.stride, columns * head.stride), rig, rig)
        maps = features[:, :, : head.memory_embed[0].in_features]
        return head(maps, *position, pose, pose, head.initial_memory(pose), last_level_only=True)

    return run


def add_global_calls(builder: SpaceBuilder, model: nn.Module, shape: InputShape, added: Collection[str]) -> None:
    """Add the cost of sums, norms and the like that depend on one of the dimensions ``added``."""
    if not added:
        return
    head = model.get_submodule(HEAD)
    deployed = run_head(model, (shape.num_cams, shape.height // head.stride, shape.width // head.stride))
    branches = [
        f"{HEAD}.{name}.0.{i}" for name in ("cls_branches", "reg_branches") for i in range(len(head.cls_branches[0]))
    ]
    add_call_terms(
        builder, model, lambda whole: whole, run_head(model, SMALL), deployed, "head", [LAYERS, *branches], only=added
    )


def open_queries(builder: SpaceBuilder, model: nn.Module, dimension: Dimension) -> None:
    """Let the terms of everything that runs on as many rows as there are queries depend on their number.

    Which ones these are is seen by running the head with one query less.

    Args:
        builder: Holds all terms of products, attentions and feed-forward networks.
        model: The dense model.
        dimension: The number of learned queries.
    """
    terms = {name: term for name, term in builder.terms.items() if term.engine == "head"}
    digest = model_digest(model)
    cut = Cut(dimension.kind, dimension.size, (tuple(range(dimension.size - 1)),), dimension.members)
    fewer = apply_plan(shared_copy(model), PruningPlan(digest, {dimension.name: cut}, {}))
    run = run_head(model, SMALL)
    dense, less = _rows(model, run, terms), _rows(fewer, run, terms)
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


def _rows(model: nn.Module, run: Run, names: Collection[str]) -> dict[str, int]:
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
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return found
