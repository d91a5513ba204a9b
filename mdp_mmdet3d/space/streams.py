"""The embedding width of a transformer: the channels of the stream that its sub-layers read and add to."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.channels import ordered_runs
from mdp_mmdet3d.space.flow import Flow, Place
from mdp_mmdet3d.space.types import COMBINATIONS, DimensionKind, TensorAxis


@dataclass(frozen=True)
class _Stream:
    """Channels that go together.

    Attributes:
        name: Of its dimension.
        size: Elements.
        width: Channels of one element where the stream was looked at.
        members: Where they lie.
        parts: Dimensions of convolutions that make nothing but the stream.
        obstacle: Why they stay; empty if they need not.
    """

    name: str
    size: int
    width: int
    members: tuple[TensorAxis, ...]
    parts: tuple[str, ...]
    obstacle: str


def add_embed_widths(builder: SpaceBuilder, flow: Flow, readers: Sequence[Place]) -> None:
    """Add one dimension per stream; what cannot be cut is left alone with the reason.

    Args:
        builder: Holds all dimensions of what reads the streams already.
        flow: `follow_channels` of the model.
        readers: Weights and axes that read a stream, such as the columns of a query projection.
    """
    streams: dict[str, _Stream] = {}
    done: set[int] = set()
    for place in readers:
        labels = flow.labels.get(place)
        if labels is None or done & set(labels.tolist()):
            continue
        done |= set(labels.tolist())
        of_stream = [other for other in readers if np.isin(flow.labels.get(other, ()), labels).any()]
        stream = _stream(builder, flow, labels, of_stream)
        streams[stream.name] = stream
    if not streams:
        builder.leave("embed", "no attention or feed-forward network was found whose stream could be cut")
        return
    open_streams = [stream for stream in streams.values() if not stream.obstacle]
    most = min(builder.options.max_options, math.floor(COMBINATIONS ** (1 / max(1, len(open_streams))) + 1e-9))
    for stream in streams.values():
        if stream.obstacle:
            builder.leave(stream.name, stream.obstacle)
            continue
        multiple = builder.options.channel_multiple
        step = multiple // math.gcd(multiple, stream.width)
        added = builder.add_dimension(
            stream.name,
            DimensionKind.EMBED_WIDTH,
            stream.size,
            stream.members,
            _sources(builder.model, stream.members),
            multiple=step * max(1, -(-stream.size // (step * most))),
            scale=0.5,  # a gate on a channel is seen where it is written and at the norm that reads it
        )
        if isinstance(added, str):
            for part in stream.parts:
                del builder.dimensions[part]
            for member in stream.members:  # convolutions whose channels turned out to be the stream's
                path = member.tensor.rpartition(".")[0]
                if member.axis == isinstance(builder.model.get_submodule(path), nn.ConvTranspose2d):
                    builder.left_alone.pop(f"{path}.out", None)


def _stream(builder: SpaceBuilder, flow: Flow, labels: np.ndarray, readers: Sequence[Place]) -> _Stream:
    elements = list(dict.fromkeys(labels.tolist()))
    places: dict[Place, list[np.ndarray]] = {
        place: [np.flatnonzero(found == element) for element in elements]
        for place, found in flow.labels.items()
        if np.isin(found, elements).any()
    }
    name = _name(readers)
    width = len(labels) // len(elements)
    obstacle = next((f"a channel {flow.marks[e]}" for e in elements if e in flow.marks), "")
    if len(elements) == 1:
        obstacle = obstacle or "its channels can only go as a whole"
    members: list[TensorAxis] = []
    within = [d.name for d in builder.dimensions.values() if places.keys() >= {(m.tensor, m.axis) for m in d.members}]
    cut = {(m.tensor, m.axis): d.name for d in builder.dimensions.values() if d.name not in within for m in d.members}
    for (tensor, axis), inside in places.items():
        alike = len({len(indices) for indices in inside}) == 1
        runs = ordered_runs(np.array(inside)) if alike else None
        if runs is None:
            obstacle = obstacle or f"its channels are not in order in {tensor}"
        elif tensor in flow.shared:
            obstacle = obstacle or f"{tensor} is held by several modules"
        elif (tensor, axis) in cut:
            obstacle = obstacle or f"its channels in {tensor} are those of {cut[tensor, axis]}"
        else:
            members += [TensorAxis(tensor, axis, run.offset, run.width) for run in runs]
    return _Stream(name, len(elements), width, tuple(members), tuple(within), obstacle)


def _name(readers: Sequence[Place]) -> str:
    """After the module that holds everything that attends to the stream."""
    paths = [tensor.split(".")[:-1] for tensor, _ in readers]
    common = []
    for parts in zip(*paths):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join([*common, "embed"])


def _sources(model: nn.Module, members: Sequence[TensorAxis]) -> list[list[TensorAxis]]:
    """What writes a channel, and the norms: one group per module, and per parameter that no known layer holds."""
    parameters = dict(model.named_parameters())
    groups: dict[str, list[TensorAxis]] = defaultdict(list)
    for member in members:
        if member.tensor not in parameters:
            continue
        path = member.tensor.rpartition(".")[0]
        owner = model.get_submodule(path)
        if isinstance(owner, nn.Embedding):
            groups[path].append(member)
        elif isinstance(owner, (nn.Linear, nn.Conv2d)):
            if member.axis == 0:
                groups[path].append(member)
        elif isinstance(owner, nn.ConvTranspose2d):
            if member.axis == 1 or member.tensor.endswith("bias"):
                groups[path].append(member)
        elif next(owner.children(), None) is None and parameters[member.tensor].ndim == 1:
            groups[path].append(member)  # a norm, a layer scale
        elif not (parameters[member.tensor].ndim == 2 and "weight" in member.tensor):
            groups[member.tensor].append(member)  # tokens and positions; the rest are packed projections
    return list(groups.values())
