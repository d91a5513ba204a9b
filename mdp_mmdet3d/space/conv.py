"""Channel dimensions of a convolutional network, traced with torch-pruning's dependency graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch_pruning as tp
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from mmcv.cnn.bricks.wrappers import Conv2d as MmcvConv2d
from mmcv.cnn.bricks.wrappers import ConvTranspose2d as MmcvConvTranspose2d
from torch import Tensor, nn
from torch_pruning.dependency import index_mapping

from mdp_mmdet3d.layers.evaluation import evaluating
from mdp_mmdet3d.operators import ConvGeometry
from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.channels import Axis, Bundle, ChannelTies
from mdp_mmdet3d.space.coupled import indexed_groups
from mdp_mmdet3d.space.types import DimensionKind, TensorAxis

TRACE_SIZE = 128  # pixels; channel coupling does not depend on the image size
Norm = nn.modules.batchnorm._NormBase
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
TRACED = (*CONVOLUTIONS, nn.Linear, Norm, nn.GroupNorm, nn.LayerNorm)


def conv_obstacle(conv: nn.Module) -> str | None:
    """Why a convolution can be neither cut nor priced as what it is, or None."""
    if type(conv) not in (nn.Conv2d, MmcvConv2d, Conv2dAdaptivePadding, nn.ConvTranspose2d, MmcvConvTranspose2d):
        return f"is a {type(conv).__name__}, not a plain convolution"
    if isinstance(conv, nn.ConvTranspose2d) and conv.groups > 1:
        return f"is a {type(conv).__name__} with groups"
    if "weight" not in conv._parameters:
        return "computes its weight from other parameters"
    if conv.padding_mode != "zeros":
        return f"pads with {conv.padding_mode!r}, not with zeros"
    if conv.padding == "same":
        return "has padding='same', which may differ between the two sides; give numbers"
    return None


def norm_obstacle(norm: nn.Module) -> str | None:
    """Why a norm cannot be cut and folded into the convolution in front of it, or None."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return f"is a {type(norm).__name__}, which is not supported"
    if not norm.affine:
        return f"is a {type(norm).__name__} without weight and bias"
    if not norm.track_running_stats:
        return f"is a {type(norm).__name__} without running statistics"
    return None


def is_depthwise(conv: nn.Module) -> bool:
    """Whether it is a convolution in which every channel has a kernel of its own."""
    return isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels == conv.out_channels > 1


def conv_geometry(conv: nn.Conv2d) -> ConvGeometry:
    """Sizes of a convolution that has no `conv_obstacle`."""
    padding = (0, 0) if isinstance(conv.padding, str) else conv.padding  # "valid" is no padding
    if isinstance(conv, Conv2dAdaptivePadding):  # pads what half the kernel reaches over, unevenly where it strides
        padding = tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return ConvGeometry(
        (int(conv.kernel_size[0]), int(conv.kernel_size[1])),  # SECONDFPN's are numpy's
        (int(conv.stride[0]), int(conv.stride[1])),
        (int(padding[0]), int(padding[1])),
        (int(conv.dilation[0]), int(conv.dilation[1])),
        conv.groups,
    )


def add_conv_dimensions(
    builder: SpaceBuilder,
    encoder: nn.Module,
    in_channels: int = 3,
    *,
    size: tuple[int, int] = (TRACE_SIZE, TRACE_SIZE),
    outputs_are_read: bool = True,
) -> None:
    """Add one dimension per group of coupled convolution channels.

    Args:
        builder: Receives the dimensions; blocks must have been added before, so that scores are booked to them.
        encoder: Maps (B, in_channels, H, W) to the feature maps that are consumed outside; its submodules are
            submodules of the builder's model.
        in_channels: Channels of the input image.
        size: Height and width in pixels of the image that is traced.
        outputs_are_read: Whether more of the builder's model reads what ``encoder`` returns; else channels that nothing
            reads are outputs of the model, and stay.
    """
    names = {module: name for name, module in builder.model.named_modules()}
    _exclude_unknown(builder, encoder, names)
    traced = _TracedChannels(builder, names)
    with _traceable(encoder), indexed_groups() as circular:
        graph = tp.DependencyGraph().build_dependency(
            encoder, example_inputs=(torch.zeros(1, in_channels, *size),), verbose=False
        )
        _correct_splits(graph)
        for group in graph.get_all_groups(root_module_types=CONVOLUTIONS):
            traced.add(graph, group, group[0].dep.target.module in circular)
    traced.tie_groups()
    traced.write(outputs_are_read)
    for module in encoder.modules():
        if (
            isinstance(module, CONVOLUTIONS)
            and module not in traced.reached
            and builder.excluded(names[module]) is None
        ):
            builder.leave(f"{names[module]}.out", "not reached by the tracer: frozen or unused")


def _exclude_unknown(builder: SpaceBuilder, encoder: nn.Module, names: dict[nn.Module, str]) -> None:
    """Exclude operators that the dependency graph cannot see as one: it would couple their parts, or nothing at all."""
    for module in encoder.modules():
        parts = [m for m in module.modules() if isinstance(m, CONVOLUTIONS)]
        own = [p for p in module.parameters(recurse=False) if not is_scale(p)]
        if own and parts and names.get(module) and not isinstance(module, CONVOLUTIONS):
            builder.exclude(names[module], f"is a {type(module).__name__}, which is not supported")
        elif isinstance(module, (nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)) and not module.affine:
            # Without parameters it is no node of the graph; whatever stands beside it is left alone.
            builder.exclude(names[module].rpartition(".")[0], f"{names[module]} {norm_obstacle(module)}")


def is_scale(parameter: Tensor) -> bool:
    """Whether it has one axis only that is longer than 1, as a layer scale: its module computes what its parts do."""
    return sum(length > 1 for length in parameter.shape) <= 1


class _TracedChannels:
    """Collects torch-pruning's groups; writes elements that nothing forbids as dimensions."""

    def __init__(self, builder: SpaceBuilder, names: dict[nn.Module, str]) -> None:
        self.builder, self.names, self.ties = builder, names, ChannelTies()
        self.groups: list[list[Axis]] = []  # sides of each group, the root first
        self.left: list[tuple[Axis, tuple[int, ...], str]] = []
        self.reached: set[nn.Module] = set()

    def add(self, graph: tp.DependencyGraph, group: tp.Group, circular: bool = False) -> None:
        """Tie the channels of one group; one that goes in circles is left alone."""
        root: Axis = (group[0].dep.target.module, "out")
        self.ties.add(root, _length(root))
        indices = tuple(index for index in group[0].idxs if index < self.ties.length(root))  # a circle shifts them
        reason = "is written in place into slices of what it makes, which tracing cannot follow" if circular else None
        sides = [root]
        for item in group:
            module, makes = item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)
            if makes:
                self.reached.add(module)
            if (obstacle := _obstacle(self.builder, module, self.names)) is not None:
                reason = reason or obstacle
                continue
            if type(module).__name__ == "_SplitOp":
                if (part := _equal_part(item.dep.target)) is None:
                    reason = reason or "is split into parts of different sizes, and which goes where is not traced"
                elif len(item.root_idxs) == len(item.idxs) and not circular:
                    self._tie_parts(root, item.root_idxs, item.idxs, part)
            if module not in self.names or not isinstance(module, TRACED):
                continue  # shape bookkeeping of torch-pruning: reshape, add, concatenation
            if isinstance(module, nn.Linear) and makes:
                reason = reason or (f"coupled with the linear layer {self.names[module]} otherwise than by its columns")
                continue
            side: Axis = (module, "out" if makes or is_depthwise(module) else "in")
            self.ties.add(side, _length(side))
            if len(item.root_idxs) != len(item.idxs) or max(item.idxs) >= self.ties.length(side):
                reason = reason or f"its channels cannot be told apart in {self.names[module]}"
                continue
            self.ties.tie(root, item.root_idxs, side, item.idxs)
            sides.append(side)
        self.groups.append(list(dict.fromkeys(sides)))
        if reason is not None:
            self.left.append((root, indices, reason))

    def _tie_parts(self, root: Axis, indices: Sequence[int], split: Sequence[int], part: int) -> None:
        """Tie what lies at the same place in equal parts of a split: the parts stay equal, whichever goes where."""
        first: dict[int, int] = {}
        for index, place in zip(indices, split, strict=True):
            self.ties.tie(root, [first.setdefault(place % part, index)], root, [index])

    def tie_groups(self) -> None:
        """Tie what a grouped convolution or a group norm can only lose as a whole."""
        for module in dict.fromkeys(module for group in self.groups for module, _ in group):
            if isinstance(module, nn.GroupNorm):
                self._tie_blocks((module, "out"), module.num_groups)
            elif isinstance(module, nn.Conv2d) and module.groups > 1 and not is_depthwise(module):
                sides: tuple[Axis, Axis] = ((module, "in"), (module, "out"))
                for side in sides:
                    self.ties.add(side, _length(side))
                    self._tie_blocks(side, module.groups)
                firsts = [range(0, _length(side), _length(side) // module.groups) for side in sides]
                self.ties.tie(sides[0], firsts[0], sides[1], firsts[1])

    def _tie_blocks(self, side: Axis, blocks: int) -> None:
        width = _length(side) // blocks
        rest = [index for index in range(_length(side)) if index % width]
        self.ties.tie(side, [index - index % width for index in rest], side, rest)

    def write(self, outputs_are_read: bool) -> None:
        """Add dimensions, and leave what has an obstacle."""
        left: dict[int, str] = {}
        for root, indices, reason in self.left:
            for index in indices:
                left.setdefault(self.ties.element(root, index), reason)
        every = list(dict.fromkeys(side for group in self.groups for side in group))
        done: set[int] = set()
        for group in self.groups:
            order = list(dict.fromkeys([*group, *every]))
            for bundle in self.ties.bundles(group[0], order):
                if bundle.elements[0] not in done:
                    reasons = [left[element] for element in bundle.elements if element in left]
                    self._write(group[0], bundle, next(iter(reasons), None), outputs_are_read)
                done.update(bundle.elements)

    def _write(self, root: Axis, bundle: Bundle, reason: str | None, outputs_are_read: bool) -> None:
        name = self._label(root, bundle)
        for side, runs in bundle.runs.items():
            if runs is None:
                reason = reason or f"its channels are not in order in {self.names[side[0]]}"
        if reason is not None:
            for side in bundle.runs:
                if isinstance(side[0], CONVOLUTIONS) and side[1] == "out":
                    self.builder.leave(f"{self.names[side[0]]}.out", reason)
            return
        if not outputs_are_read and not any(_reads(side) for side in bundle.runs):
            self.builder.leave(name, "nothing reads its channels: they are an output of the model")
            return
        members: list[TensorAxis] = []
        norms: list[tuple[TensorAxis, ...]] = []
        producers: list[tuple[TensorAxis, ...]] = []
        multiples = [1]
        for side, runs in bundle.runs.items():
            module, path = side[0], self.names[side[0]]
            transposed = isinstance(module, nn.ConvTranspose2d)
            for run in runs or ():
                if side[1] == "in" and transposed:
                    members.append(TensorAxis(f"{path}.weight", 0, run.offset, run.width))
                    continue
                if side[1] == "in":
                    if isinstance(module, nn.Linear) or module.groups == 1:
                        members.append(TensorAxis(f"{path}.weight", 1, run.offset, run.width))
                    continue
                own = [leaf for leaf, _ in module.named_parameters(recurse=False)]
                rows = tuple(
                    TensorAxis(f"{path}.{leaf}", int(transposed and leaf == "weight"), run.offset, run.width)
                    for leaf in own
                )
                members += rows
                if isinstance(module, CONVOLUTIONS):
                    multiple = self.builder.options.channel_multiple
                    multiples.append(multiple // math.gcd(multiple, run.width))
                    if not is_depthwise(module):
                        producers.append(rows)
                    continue
                norms.append(rows)
                if isinstance(module, Norm):
                    statistics = ("running_mean", "running_var")
                    members += [TensorAxis(f"{path}.{leaf}", 0, run.offset, run.width) for leaf in statistics]
        self.builder.add_dimension(
            name,
            DimensionKind.CHANNELS,
            len(bundle.elements),
            dict.fromkeys(members),
            dict.fromkeys(norms or producers),
            multiple=math.lcm(*multiples),
        )

    def _label(self, side: Axis, bundle: Bundle) -> str:
        """The convolution's output, with the first channel where the bundle is a part of it."""
        channels = bundle.channels[side]
        part = "" if len(channels) == self.ties.length(side) else f"@{channels[0]}"
        return f"{self.names[side[0]]}.out{part}"


def _length(side: Axis) -> int:
    """Channels of one side of a layer."""
    module, which = side
    if isinstance(module, nn.ConvTranspose2d):
        return int(module.in_channels if which == "in" else module.out_channels)
    if isinstance(module, (nn.Conv2d, nn.Linear)) and which == "in":
        return int(module.weight.shape[1]) * getattr(module, "groups", 1)
    return int(module.weight.shape[0])


def _equal_part(split: tp.dependency.Node) -> int | None:
    """Channels of each part of a split of channels; None if they differ, or something else is split."""
    made = split.grad_fn
    shape: Sequence[int] = getattr(made, "_saved_self_sym_sizes", ())
    axis = getattr(made, "_saved_dim", -1)
    if axis != 1 or len(shape) < 2:
        return None
    sizes = set(getattr(made, "_saved_split_sizes", None) or [getattr(made, "_saved_split_size", 0)])
    part = int(sizes.pop())
    return None if sizes or not part or shape[1] % part else part


def _correct_splits(graph: tp.DependencyGraph) -> None:
    """Give splits the sizes that they have: torch-pruning guesses them, and places concatenations by its guess."""
    splits = [node for node in graph.module2node.values() if type(node.module).__name__ == "_SplitOp"]
    for node in splits:
        if (part := _equal_part(node)) is not None:
            node.module.split_sizes = [part] * len(node.outputs)
            node.module.offsets = [part * index for index in range(len(node.outputs) + 1)]
    for node in graph.module2node.values() if splits else ():
        if type(node.module).__name__ == "_ConcatOp":
            node.module.concat_sizes = None
    if splits:
        index_mapping.update_index_mapping(graph)


def _reads(side: Axis) -> bool:
    """Whether the layer computes something from the channels."""
    module, which = side
    return which == "in" or (isinstance(module, nn.Conv2d) and is_depthwise(module))


def _obstacle(builder: SpaceBuilder, module: nn.Module | Tensor, names: dict[nn.Module, str]) -> str | None:
    """Why a group that holds ``module`` is left alone, or None."""
    if isinstance(module, Tensor):
        owners = (name for name, tensor in builder.model.named_parameters() if tensor is module)
        return f"coupled with the parameter {next(owners, '')}, whose module is not supported"
    if module not in names:
        return None
    name = names[module]
    excluded = builder.excluded(name)
    if excluded is not None:
        return excluded
    if isinstance(module, CONVOLUTIONS):
        reason = conv_obstacle(module)
    elif isinstance(module, Norm):
        reason = norm_obstacle(module)
    elif type(module) in (nn.GroupNorm, nn.LayerNorm):
        several = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1
        plain = None if several else getattr(module, "weight", None)
        reason = (
            f"is a {type(module).__name__} over more than the channels, or without weight" if plain is None else None
        )
    else:
        known = isinstance(module, nn.Linear) or next(module.parameters(), None) is None
        reason = None if known else f"is a {type(module).__name__}, which is not supported"
    return None if reason is None else f"coupled with {name}, which {reason}"


@contextmanager
def _traceable(encoder: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients on and activation checkpointing off: tracing follows ``grad_fn``."""
    checkpointed = [m for m in encoder.modules() if getattr(m, "with_cp", False)]
    # torch-pruning calls eval(), and mmdet's backbones then freeze these stages again
    stages = {m: m.frozen_stages for m in encoder.modules() if isinstance(getattr(m, "frozen_stages", None), int)}
    frozen = [p for p in encoder.parameters() if not p.requires_grad]
    try:
        for module in stages:
            module.frozen_stages = -1
        for module in checkpointed:
            module.with_cp = False
        for parameter in frozen:
            parameter.requires_grad_(True)
        with evaluating(encoder), torch.enable_grad():
            yield
    finally:
        for module, count in stages.items():
            module.frozen_stages = count
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module in checkpointed:
            module.with_cp = True
