"""Refit one layer of a pruned model to the dense model's outputs, if that helps on frames that it was not fitted to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.surgery.repair.layers import Layer, ResidualLayer
from mdp_mmdet3d.surgery.repair.moments import Moments
from mdp_mmdet3d.surgery.repair.processes import anywhere, failing_together
from mdp_mmdet3d.surgery.repair.replay import Replay
from mdp_mmdet3d.surgery.repair.settings import LayerRepair
from mdp_mmdet3d.surgery.repair.targets import Target, grid_of

EXACT = 1e-6  # a relative error below it is rounding
RIDGE_STEPS, RIDGE_FACTOR = 4, 5.0  # firmer and firmer, as long as that is better on held-out samples
CHECKED_SAMPLES = 256  # on which the changed module is run again
CHECK_TOLERANCE = 1e-2  # relative to the change of the outputs


class _OtherShape(Exception):
    """An output of the pruned layer has another shape than the dense one's."""


@dataclass
class _Probe:
    """One call, kept to run the module again: does it do what its kind says?"""

    inputs: Tensor
    where: Tensor
    x: Tensor


def fit_layer(
    layer: Layer,
    replay: Replay,
    targets: Mapping[int, Sequence[Target]],
    pairs: Mapping[int, int],
    calls: int,
    held_out: Callable[[int, int], Tensor],
    ridge: float,
) -> LayerRepair:
    """Change the layer's weights where that helps; else leave them as they are and say why.

    Args:
        layer: Of the pruned model.
        replay: Of the pruned model, whose earlier layers are settled.
        targets: Of this layer, by frame.
        pairs: Dense call by call of the pruned layer, see `pairs_of`.
        calls: How often a frame runs it.
        held_out: Mask of the samples (frame, count) that judge the fit.
        ridge: See `Moments.solve`.

    Raises:
        MdpError: An input or output is not finite.
    """
    kind = type(layer.module).__name__
    if not pairs:
        return LayerRepair(layer.name, kind, calls, left="its calls cannot be paired with the dense model's")
    device = next(iter(layer.tensors.values())).device
    fitted, judged = (Moments(*layer.shape, device=device) for _ in range(2))
    probe: list[_Probe] = []
    problem = ""
    with failing_together():
        for index, frame_targets in targets.items():
            try:
                _collect(layer, replay, index, frame_targets, pairs, calls, held_out, fitted, judged, probe)
            except _OtherShape:
                problem = "the dense model's output has another shape"
    fitted.reduce()
    judged.reduce()
    if anywhere(bool(problem)) or fitted.count == 0:
        return LayerRepair(layer.name, kind, calls, left=problem or "no samples of it can be compared")
    samples = fitted.samples
    before = fitted.error(centred=layer.to_norm), judged.error(centred=layer.to_norm)

    def result(after: tuple[float, float], left: str = "") -> LayerRepair:
        pair = (before[0], after[0]), (before[1], after[1])
        return LayerRepair(layer.name, kind, calls, samples, layer.shape[1], *pair, left)

    if max(before) < EXACT:
        return result(before, "it equals the dense model's")
    after, firmness = _firmness(layer, fitted, judged, ridge)
    if not after[1] < before[1]:
        return result(after, "no better on held-out frames")
    # How firm to hold is known; the samples that told it are worth as much as the others.
    fitted.merge(judged)
    weight, constant = _solution(layer, fitted, firmness)
    saved = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    outputs = [_rows(layer, each) for each in probe]
    layer.change(weight, torch.zeros_like(fitted.mean_r) if constant is None else constant)
    if anywhere(not all(_does(layer, each, rows, weight, constant) for each, rows in zip(probe, outputs))):
        for name, tensor in layer.tensors.items():
            tensor.copy_(saved[name])
        return result(after, f"this {kind} is not the linear map that its class stands for")
    return result(after)


def _firmness(layer: Layer, fitted: Moments, judged: Moments, ridge: float) -> tuple[tuple[float, float], float]:
    """Errors on fitted and held-out samples, and the ridge: firmer than asked for where that is better held out."""
    best = (float("inf"), float("inf")), ridge
    for step in range(RIDGE_STEPS):
        tried = ridge * RIDGE_FACTOR**step
        solution = _solution(layer, fitted, tried)
        errors = tuple(moments.error(*solution, centred=layer.to_norm) for moments in (fitted, judged))
        if not errors[1] < best[0][1]:
            break
        best = (errors[0], errors[1]), tried
    return best


def _solution(layer: Layer, moments: Moments, ridge: float) -> tuple[Tensor, Tensor | None]:
    weight = layer.bounded(moments.solve(ridge, layer.centred))
    return weight, moments.constant(weight) if layer.centred else None


def _collect(
    layer: Layer,
    replay: Replay,
    index: int,
    targets: Sequence[Target],
    pairs: Mapping[int, int],
    calls: int,
    held_out: Callable[[int, int], Tensor],
    fitted: Moments,
    judged: Moments,
    probe: list[_Probe],
) -> None:
    ordinal = 0
    kept_inputs: list[Tensor] = []

    def add(inputs: Tensor, output: Tensor) -> None:
        nonlocal ordinal
        ordinal += 1
        partner = pairs.get(ordinal - 1)
        if partner is None or partner >= len(targets):
            return
        target = targets[partner]
        if grid_of(layer, output) != target.grid:
            raise _OtherShape
        x, rows = layer.inputs(inputs, output, target.where), layer.outputs(output, target.where)
        if not bool(x.isfinite().all() and rows.isfinite().all()):
            raise MdpError(
                f"repair: {layer.name} of the pruned model takes or gives values that are not finite in calibration "
                f"batch {index}; check the checkpoint and the data, or switch repair off with prune.repair=False"
            )
        t = layer.grouped(target.rows)
        r = t - layer.grouped(rows)
        mask = held_out(index, x.shape[1]).to(x.device)
        for moments, chosen in ((fitted, ~mask), (judged, mask)):
            weights = None if target.weights is None else target.weights[chosen]
            moments.add(x[:, chosen], r[:, chosen], t[:, chosen], weights)
        if not probe:
            some = slice(0, CHECKED_SAMPLES)
            probe.append(_Probe(inputs.clone(), target.where[some], x[:, some].clone()))

    if isinstance(layer, ResidualLayer):
        replay.run(
            index,
            {layer.map.name},
            lambda observed: kept_inputs.append(observed.inputs),
            2,
            {layer.name: layer.last},
            lambda name, output: add(kept_inputs[-1], output),
        )
    else:
        replay.run(index, {layer.name}, lambda observed: add(observed.inputs, observed.output), calls)


def _rows(layer: Layer, probe: _Probe) -> Tensor:
    with torch.no_grad():
        return layer.grouped(layer.outputs(layer.run(probe.inputs), probe.where)).double()


def _does(layer: Layer, probe: _Probe, before: Tensor, weight: Tensor, constant: Tensor | None) -> bool:
    """Whether the changed module's outputs changed as those of a linear map do."""
    found = _rows(layer, probe) - before
    expected = probe.x.double() @ weight.mT
    if constant is not None and layer.has_constant:
        expected = expected + constant[:, None]
    scale = max(float(expected.abs().max()), 1e-4 * float(before.abs().max()), 1e-12)
    half = next(iter(layer.tensors.values())).dtype in (torch.float16, torch.bfloat16)
    return float((found - expected).abs().max()) <= (10 if half else 1) * CHECK_TOLERANCE * scale
