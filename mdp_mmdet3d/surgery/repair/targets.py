"""What the dense model computed at the outputs that are left: the targets of a fit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.surgery.repair.layers import Layer, ResidualLayer
from mdp_mmdet3d.surgery.repair.replay import Call, Observed, Replay


@dataclass(frozen=True)
class Target:
    """Outputs of one call of a dense layer at sampled positions.

    Attributes:
        call: The call; None for a sum.
        grid: Shape of the output without its channels.
        where: (P,) positions in the flattened grid.
        rows: (P, C) outputs that are left, in float32.
        weights: (P,) how much each counts; None: all alike.
    """

    call: Call | None
    grid: tuple[int, ...]
    where: Tensor
    rows: Tensor
    weights: Tensor | None = None


@dataclass
class Sampling:
    """Which positions are looked at, alike for any number of processes.

    Attributes:
        rate: Share of the positions, per layer.
        seed: Of the choice.
    """

    seed: int
    rate: dict[str, float] = field(default_factory=dict)

    def where(self, name: str, frame: int, ordinal: int, count: int) -> Tensor:
        """Some of ``count`` positions in the output of a layer's ``ordinal``-th call in a frame."""
        key = hashlib.sha256(f"{self.seed}/{name}/{frame}/{ordinal}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        wanted = min(count, max(1, round(self.rate[name] * count)))
        return torch.randperm(count, generator=generator)[:wanted].sort().values


def grid_of(layer: Layer, output: Tensor) -> tuple[int, ...]:
    """Shape of an output without its channels."""
    axis = layer.channel_axis % output.dim()
    return tuple(size for i, size in enumerate(output.shape) if i != axis)


def weights_of(grid: tuple[int, ...], weights: Tensor | None) -> Tensor | None:
    """Weights, flat, of an output that has a row for each prediction, as the layers of a decoder do; else None."""
    if weights is None or [n for n in grid if n > 1] != [n for n in weights.shape if n > 1]:
        return None
    return weights.flatten().float()


def record_targets(
    replay: Replay,
    layers: Sequence[Layer],
    kept: Mapping[str, Tensor | None],
    calls: Mapping[str, int],
    indices: Iterable[int],
    sampling: Sampling,
    sources: Mapping[str, str],
    weights: Mapping[int, Tensor],
) -> dict[str, dict[int, list[Target]]]:
    """Targets of some layers by frame, from one pass of the dense model over the frames.

    Args:
        replay: Of the dense model.
        layers: Those of the pruned model; the dense model's have the same names.
        kept: Outputs of the dense layer that are left; None: all.
        calls: How often a frame runs each of them in the dense model.
        indices: Of the frames.
        sampling: Which positions.
        sources: Modules of the dense model that layers, or the outputs that enter sums, stand for, where those are not
            of the same name.
        weights: By frame, how much each of its predictions counts, of any shape: an output with a row per prediction
            takes them.

    Raises:
        MdpError: An output of the dense model is not finite.
    """
    sums = {layer.name: sources.get(layer.name, layer.last) for layer in layers if isinstance(layer, ResidualLayer)}
    by_name = {layer.name if layer.name in sums else sources.get(layer.name, layer.name): layer for layer in layers}
    watched = {name: calls[layer.name] for name, layer in by_name.items() if name not in sums}
    found: dict[str, dict[int, list[Target]]] = {layer.name: {} for layer in layers}
    for index in indices:

        def note(name: str, output: Tensor, call: Call | None, index: int = index) -> None:
            layer = by_name[name]
            targets = found[layer.name].setdefault(index, [])
            grid = grid_of(layer, output)
            where = sampling.where(layer.name, index, len(targets), torch.Size(grid).numel()).to(output.device)
            rows = layer.outputs(output, where)
            if (stays := kept[layer.name]) is not None:
                rows = rows.index_select(1, stays.to(rows.device))
            if not bool(rows.isfinite().all()):
                raise MdpError(
                    f"repair: the dense model's {name} gives values that are not finite in calibration batch {index}; "
                    "check the checkpoint and the data, or switch repair off with prune.repair=False"
                )
            counts = weights_of(grid, weights.get(index))
            targets.append(Target(call, grid, where, rows, None if counts is None else counts.to(where.device)[where]))

        def on_call(observed: Observed, note: Callable[..., None] = note) -> None:
            note(observed.call.name, observed.output, observed.call)

        def on_sum(name: str, output: Tensor, note: Callable[..., None] = note) -> None:
            note(name, output, None)

        replay.run(index, set(watched), on_call, sum(watched.values()) + len(sums), sums, on_sum)
    return found


def pairs_of(dense: Sequence[Call], pruned: Sequence[Call], ends: Mapping[str, str]) -> dict[int, int]:
    """Which call of the dense layer each call of the pruned one stands for, by number.

    As many calls: in order. Fewer, since blocks are removed: by the module that ran before, as a norm behind every
    layer of a decoder does; behind a block that removed ones follow, by the last of those (`run_ends`).
    """
    if len(dense) == len(pruned):
        return {i: i for i in range(len(pruned))}
    places = {(call.path[:-1], call.before, call.index): i for i, call in enumerate(dense)}
    keys = [(call.path[:-1], ends.get(call.before, call.before), call.index) for call in pruned]
    return {i: places[key] for i, key in enumerate(keys) if key in places}
