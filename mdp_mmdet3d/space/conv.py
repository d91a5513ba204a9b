"""Channel dimensions of a convolutional network, traced with torch-pruning's dependency graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch_pruning as tp
from mmcv.cnn.bricks.wrappers import Conv2d as MmcvConv2d
from torch import Tensor, nn

from mdp_mmdet3d.operators import ConvGeometry
from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.types import DimensionKind, TensorAxis

TRACE_SIZE = 128  # pixels; channel coupling does not depend on the image size
Norm = nn.modules.batchnorm._NormBase


def conv_obstacle(conv: nn.Module) -> str | None:
    """Why a convolution can be neither cut nor priced as what it is, or None."""
    if type(conv) not in (nn.Conv2d, MmcvConv2d):
        return f"is a {type(conv).__name__}, not a plain convolution"
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


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether every channel has a kernel of its own."""
    return conv.groups == conv.in_channels == conv.out_channels > 1


def conv_geometry(conv: nn.Conv2d) -> ConvGeometry:
    """Sizes of a convolution that has no `conv_obstacle`."""
    padding = (0, 0) if isinstance(conv.padding, str) else conv.padding  # "valid" is no padding
    return ConvGeometry(
        (conv.kernel_size[0], conv.kernel_size[1]),
        (conv.stride[0], conv.stride[1]),
        (int(padding[0]), int(padding[1])),
        (conv.dilation[0], conv.dilation[1]),
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
    with _traceable(encoder):
        graph = tp.DependencyGraph().build_dependency(
            encoder, example_inputs=(torch.zeros(1, in_channels, *size),), verbose=False
        )
        reached: set[nn.Module] = set()
        for group in graph.get_all_groups(root_module_types=(nn.Conv2d,)):
            _add_group(builder, graph, group, names, outputs_are_read)
            reached |= {i.dep.target.module for i in group if graph.is_out_channel_pruning_fn(i.dep.handler)}
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and module not in reached and builder.excluded(names[module]) is None:
            builder.leave(f"{names[module]}.out", "not reached by the tracer: frozen or unused")


def _exclude_unknown(builder: SpaceBuilder, encoder: nn.Module, names: dict[nn.Module, str]) -> None:
    """Exclude operators that the dependency graph cannot see as one: it would couple their parts, or nothing at all."""
    for module in encoder.modules():
        parts = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        own = next(module.parameters(recurse=False), None)
        if own is not None and parts and not isinstance(module, nn.Conv2d):
            builder.exclude(names[module], f"is a {type(module).__name__}, which is not supported")
        elif isinstance(module, nn.modules.instancenorm._InstanceNorm) and not module.affine:
            # Without parameters it is no node of the graph; whatever stands beside it is left alone.
            builder.exclude(names[module].rpartition(".")[0], f"{names[module]} {norm_obstacle(module)}")


def _add_group(
    builder: SpaceBuilder,
    graph: tp.DependencyGraph,
    group: tp.Group,
    names: dict[nn.Module, str],
    outputs_are_read: bool,
) -> None:
    root = names[group[0].dep.target.module]
    size = len(group[0].idxs)
    members: list[TensorAxis] = []
    norms: list[tuple[TensorAxis, ...]] = []
    producers: list[tuple[TensorAxis, ...]] = []
    consumed = False
    for item in group:
        module = item.dep.target.module
        obstacle = _obstacle(builder, module, names)
        if obstacle is not None:
            _leave_group(builder, graph, group, names, obstacle)
            return
        if module not in names or not isinstance(module, (nn.Conv2d, nn.Linear, Norm)):
            continue  # shape bookkeeping of torch-pruning: reshape, add, concatenation
        name, offset = names[module], _offset(item)
        if offset is None:
            _leave_group(builder, graph, group, names, f"its channels are not contiguous in {name}")
            return
        makes = isinstance(module, Norm) or graph.is_out_channel_pruning_fn(item.dep.handler)
        if makes and not isinstance(module, nn.Linear) and module.weight.shape[0] < offset + size:
            _leave_group(builder, graph, group, names, f"is split: {name} has only a part of its {size} channels")
            return
        if isinstance(module, nn.Linear):  # behind a global pooling
            if module.in_features != size or graph.is_out_channel_pruning_fn(item.dep.handler):
                _leave_group(
                    builder, graph, group, names, f"coupled with the linear layer {name} otherwise than by its columns"
                )
                return
            members.append(TensorAxis(f"{name}.weight", 1, offset))
            consumed = True
        elif isinstance(module, nn.Conv2d) and is_depthwise(module):
            members += [TensorAxis(f"{name}.{leaf}", 0, offset) for leaf, _ in module.named_parameters(recurse=False)]
            consumed = True
        elif isinstance(module, nn.Conv2d):
            if graph.is_out_channel_pruning_fn(item.dep.handler):
                if module.groups != 1:
                    _leave_group(builder, graph, group, names, f"coupled with the grouped convolution {name}")
                    return
                rows = [TensorAxis(f"{name}.weight", 0, offset)]
                if module.bias is not None:
                    rows.append(TensorAxis(f"{name}.bias", 0, offset))
                members += rows
                producers.append(tuple(rows))
            elif module.groups != 1:
                _leave_group(builder, graph, group, names, f"enters the grouped convolution {name}")
                return
            elif module.weight.shape[1] != size:
                _leave_group(builder, graph, group, names, f"enters the concatenation in front of {name}")
                return
            else:
                members.append(TensorAxis(f"{name}.weight", 1, offset))
                consumed = True
        else:
            affine = tuple(TensorAxis(f"{name}.{leaf}", 0, offset) for leaf in ("weight", "bias"))
            members += [*affine, *(TensorAxis(f"{name}.{leaf}", 0, offset) for leaf in ("running_mean", "running_var"))]
            norms.append(affine)
    if not (consumed or outputs_are_read):
        builder.leave(f"{root}.out", "nothing reads its channels: they are an output of the model")
        return
    builder.add_dimension(
        f"{root}.out", DimensionKind.CHANNELS, size, dict.fromkeys(members), dict.fromkeys(norms or producers)
    )


def _leave_group(
    builder: SpaceBuilder, graph: tp.DependencyGraph, group: tp.Group, names: dict[nn.Module, str], reason: str
) -> None:
    """Note the reason at every convolution whose output channels the group holds."""
    for item in group:
        module = item.dep.target.module
        if isinstance(module, nn.Conv2d) and graph.is_out_channel_pruning_fn(item.dep.handler):
            builder.leave(f"{names[module]}.out", reason)


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
    if isinstance(module, nn.Conv2d):
        reason = conv_obstacle(module)
    elif isinstance(module, Norm):
        reason = norm_obstacle(module)
    else:
        known = isinstance(module, nn.Linear) or next(module.parameters(), None) is None
        reason = None if known else f"is a {type(module).__name__}, which is not supported"
    return None if reason is None else f"coupled with {name}, which {reason}"


def _offset(item: tp.dependency.GroupItem) -> int | None:
    """First index of the group in this member, or None if its indices are not one ordered run."""
    first = item.idxs[0]
    ordered = list(item.root_idxs) == list(range(len(item.idxs)))
    return first if ordered and list(item.idxs) == list(range(first, first + len(item.idxs))) else None


@contextmanager
def _traceable(encoder: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients on and activation checkpointing off: tracing follows ``grad_fn``."""
    modes = {module: module.training for module in encoder.modules()}
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
        with torch.enable_grad():
            yield
    finally:
        for module, count in stages.items():
            module.frozen_stages = count
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module in checkpointed:
            module.with_cp = True
        for module, training in modes.items():
            module.training = training


def record_conv_inputs(encoder: nn.Module, image: Tensor) -> dict[nn.Module, tuple[int, int, int, int]]:
    """Input shapes (B, C, H, W) of the convolutions and max-poolings that run exactly once when ``encoder`` runs."""
    shapes: dict[nn.Module, tuple[int, int, int, int]] = {}
    again: set[nn.Module] = set()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        batch, channels, height, width = inputs[0].shape
        if module in shapes:
            again.add(module)
        shapes[module] = (batch, channels, height, width)

    handles = [m.register_forward_hook(note) for m in encoder.modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d))]
    modes = {module: module.training for module in encoder.modules()}
    try:
        encoder.eval()
        with torch.no_grad():
            encoder(image)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return {module: shape for module, shape in shapes.items() if module not in again}
