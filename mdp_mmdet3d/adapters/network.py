"""Cost terms of a convolutional network from the calls of its modules: what a runtime fuses with each convolution."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mdp_mmdet3d.adapters.residual_blocks import ResidualBlock
from mdp_mmdet3d.layers.fused import without_fused_layers
from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.calls import Call
from mdp_mmdet3d.space.residual import add_conv_term

Shapes = dict[str, list[tuple[int, ...]]]


def record_input_shapes(model: nn.Module, forward: Callable[[], Any]) -> Shapes:
    """Shape of the first input of every call of every convolution and linear layer, by path.

    A `torch.nn.MultiheadAttention` has that of its queries, and that of its keys under ``<path>.key``.
    """
    shapes: Shapes = defaultdict(list)
    kinds = (nn.Conv2d, nn.Linear, nn.MultiheadAttention)

    def note(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            first = inputs[0] if inputs else named.get("query", next(iter(named.values())))
            shapes[name].append(tuple(first.shape))
            if isinstance(module, nn.MultiheadAttention):
                shapes[f"{name}.key"].append(tuple((inputs[1] if len(inputs) > 1 else named["key"]).shape))

        return record

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        with without_fused_layers():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return dict(shapes)


def add_network_terms(
    builder: SpaceBuilder,
    calls: Sequence[Call],
    shapes: Shapes,
    blocks: Sequence[ResidualBlock],
    engine: str,
    priced: Sequence[str] = (),
) -> None:
    """Add the cost of every convolution and linear layer, once per call.

    Args:
        builder: Holds dimensions and blocks already.
        calls: `record_calls` at any image size: tells which norm and activation follow a convolution.
        shapes: `record_input_shapes` at deployment.
        blocks: Residual blocks, whose last convolution is fused with the addition.
        engine: Engine it runs in.
        priced: Paths of modules whose cost is in other terms.
    """
    readers: dict[int, list[Call]] = defaultdict(list)
    for call in calls:
        if call.leaf:
            readers[id(call.input)].append(call)
    lasts = {block.conv for block in blocks}
    counts: dict[str, int] = defaultdict(int)
    for call in calls:
        if call.name not in shapes or any(call.name.startswith(f"{path}.") for path in priced):
            continue
        index = counts[call.name]
        counts[call.name] += 1
        shape = shapes[call.name][index]
        term = call.name if index == 0 else f"{call.name}#{index + 1}"
        if isinstance(call.module, nn.Conv2d):
            batch, channels, height, width = shape
            add_conv_term(
                builder,
                call.name,
                call.module,
                {call.module: (batch, channels, height, width)},
                engine,
                relu=call.name in lasts or _has_relu(call, readers),
                residual=call.name in lasts,
                term=term,
            )
        elif isinstance(call.module, nn.Linear):
            rows = 1
            for count in shape[:-1]:
                rows *= count
            builder.add_term(
                term,
                engine,
                "linear",
                (
                    builder.width_of(f"{call.name}.weight", 1, shape[-1]),
                    builder.width_of(f"{call.name}.weight", 0, call.module.out_features),
                ),
                tokens=rows,
                norm="none",
                activation="none",
            )


def _has_relu(call: Call, readers: dict[int, list[Call]]) -> bool:
    """Whether a ReLU alone reads the convolution, or the batch norm behind it."""
    after = readers[id(call.output)]
    if len(after) >= 1 and isinstance(after[0].module, nn.modules.batchnorm._BatchNorm):
        after = readers[id(after[0].output)]
    return any(isinstance(reader.module, (nn.ReLU, nn.ReLU6)) for reader in after)
