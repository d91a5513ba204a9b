"""Channel dimensions of a convolutional network, traced with torch-pruning's dependency graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch_pruning as tp
from torch import Tensor, nn

from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.types import DimensionKind, TensorAxis

TRACE_SIZE = 128  # pixels; channel coupling does not depend on the image size


def add_conv_dimensions(
    builder: SpaceBuilder,
    encoder: nn.Module,
    in_channels: int = 3,
    *,
    size: int = TRACE_SIZE,
    outputs_are_read: bool = True,
) -> None:
    """Add one dimension per group of coupled convolution channels.

    Args:
        builder: Receives the dimensions; blocks must have been added before, so that scores are booked to them.
        encoder: Maps (B, in_channels, H, W) to the feature maps that are consumed outside; its submodules are
            submodules of the builder's model.
        in_channels: Channels of the input image.
        size: Pixels of either side of the image that is traced.
        outputs_are_read: Whether more of the builder's model reads what ``encoder`` returns; else channels that nothing
            reads are outputs of the model, and stay.
    """
    names = {module: name for name, module in builder.model.named_modules()}
    with _traceable(encoder):
        graph = tp.DependencyGraph().build_dependency(
            encoder, example_inputs=(torch.zeros(1, in_channels, size, size),), verbose=False
        )
        for group in graph.get_all_groups(root_module_types=(nn.Conv2d,)):
            _add_group(builder, graph, group, names, outputs_are_read)


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
        if module not in names or not isinstance(module, (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)):
            if isinstance(module, nn.Module) and next(module.parameters(), None) is not None:
                builder.leave(f"{root}.out", f"coupled with {type(module).__name__}, which is not supported")
                return
            continue  # shape bookkeeping of torch-pruning: reshape, add, concatenation
        name, offset = names[module], _offset(item)
        if offset is None:
            builder.leave(f"{root}.out", f"its channels are not contiguous in {name}")
            return
        if isinstance(module, nn.Linear):  # behind a global pooling
            if module.in_features != size or graph.is_out_channel_pruning_fn(item.dep.handler):
                builder.leave(f"{root}.out", f"coupled with the linear layer {name} otherwise than by its columns")
                return
            members.append(TensorAxis(f"{name}.weight", 1, offset))
            consumed = True
        elif isinstance(module, nn.Conv2d):
            if graph.is_out_channel_pruning_fn(item.dep.handler):
                if module.groups != 1:
                    builder.leave(f"{root}.out", f"coupled with the grouped convolution {name}")
                    return
                rows = [TensorAxis(f"{name}.weight", 0, offset)]
                if module.bias is not None:
                    rows.append(TensorAxis(f"{name}.bias", 0, offset))
                members += rows
                producers.append(tuple(rows))
            elif module.weight.shape[1] != size:
                builder.leave(f"{root}.out", f"enters the concatenation in front of {name}")
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
    """Input shapes (B, C, H, W) of every convolution and max-pooling, by running ``encoder`` once."""
    shapes: dict[nn.Module, tuple[int, int, int, int]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        batch, channels, height, width = inputs[0].shape
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
    return shapes
