"""Repair: refit the layers of a pruned model, one after the other, to what the dense model computed; no training."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.layers.evaluation import evaluating
from mdp_mmdet3d.layers.fused import without_fused_layers
from mdp_mmdet3d.surgery.apply import check_fits, keep_masks, with_queries_of
from mdp_mmdet3d.surgery.plan import PruningPlan
from mdp_mmdet3d.surgery.repair.data_flow import DataFlow
from mdp_mmdet3d.surgery.repair.fit import fit_layer
from mdp_mmdet3d.surgery.repair.layers import BatchNormLayer, ConvLayer, Layer, LinearLayer, ResidualLayer, layer_of
from mdp_mmdet3d.surgery.repair.processes import anywhere, failing_together, is_distributed
from mdp_mmdet3d.surgery.repair.projections import ProjectionLayer, projections_of
from mdp_mmdet3d.surgery.repair.replay import Call, Frame, Observed, Replay
from mdp_mmdet3d.surgery.repair.settings import LayerRepair, RepairReport, RepairSettings
from mdp_mmdet3d.surgery.repair.stand_ins import run_ends
from mdp_mmdet3d.surgery.repair.store import RepairStore, put
from mdp_mmdet3d.surgery.repair.targets import Sampling, pairs_of, record_targets

HELD_OUT_EVERY = 4  # one batch in so many judges the fit
TARGET_SHARE = 0.3  # of the memory; recorded outputs take the rest
OnLayer = Callable[[int, int], None]


def repair(
    dense: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    frames: Sequence[Frame],
    settings: RepairSettings | None = None,
    *,
    store: RepairStore | None = None,
    on_layer: OnLayer | None = None,
) -> RepairReport:
    """Refit every layer of ``pruned``, in place and in the order of execution, to the dense model's outputs.

    Every layer takes what the layers before it, already refitted, give; its weights are held to what they are by a
    ridge and change only if that brings the outputs nearer to the dense model's on samples that were held out. Where
    learned queries were cut, the dense model is taken without them. In a distributed run every process takes its share
    of the frames and all end with the same weights.

    Args:
        dense: The model that ``plan`` was made for; not changed.
        pruned: `apply_plan` of it.
        plan: What stays.
        frames: Batches; the same list in every process. Where a frame has ``weights``, a tensor with a number above 0
            for each of its predictions, layers with a row per prediction are fitted with these.
        settings: How.
        store: Where finished layers are kept, and taken from.
        on_layer: Called with (layers done, layers in all).

    Raises:
        MdpError: There are no frames, or a value is not finite; ``pruned`` is as it was.
        StructureMismatchError: The plan was made for another model.
    """
    settings = settings or RepairSettings()
    if not frames:
        raise MdpError(
            "repair needs calibration frames and there are none; check the importance data set, or switch repair off "
            "with prune.repair=False"
        )
    check_fits(dense, plan)
    dense, plan = with_queries_of(dense, plan)  # layers that run on queries are compared query by query
    _check_same(dense, pruned, plan)
    state = {name: tensor.detach().clone() for name, tensor in pruned.state_dict().items()}
    try:
        with evaluating(dense, pruned), without_fused_layers():
            return _Repair(dense, pruned, plan, frames, settings, store, on_layer or (lambda done, total: None)).run()
    except BaseException:
        for name, tensor in pruned.state_dict().items():
            tensor.copy_(state[name])
        raise


@dataclass
class _Trace:
    """What one frame runs.

    Attributes:
        calls: Of every layer, in the order of the first.
        positions: In the outputs of a layer.
        flow: Of its tensors.
    """

    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    positions: Counter[str] = field(default_factory=Counter)
    flow: DataFlow = field(default_factory=DataFlow)

    def sum_of(self, name: str) -> int | None:
        """When the output of a layer that runs once enters a sum; None if it does not."""
        calls = self.calls.get(name, ())
        return self.flow.sums.get(self.flow.outputs[calls[0].path][0]) if len(calls) == 1 else None


class _Repair:
    def __init__(
        self,
        dense: nn.Module,
        pruned: nn.Module,
        plan: PruningPlan,
        frames: Sequence[Frame],
        settings: RepairSettings,
        store: RepairStore | None,
        on_layer: OnLayer,
    ) -> None:
        self.dense, self.pruned, self.settings, self.store, self.on_layer = dense, pruned, settings, store, on_layer
        self.frames = frames
        rank, world = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
        self.own = [i for i in range(len(frames)) if i % world == rank]
        found = {i: getattr(frames[i], "weights", None) for i in self.own}
        self.weights = {i: weights for i, weights in found.items() if weights is not None}
        masks = keep_masks(dense, plan)
        self.ends = run_ends([name for name, _ in dense.named_modules()], plan.removed)
        self.sources: dict[str, str] = {}
        self.layers, self.left = _layers(pruned)
        self.kept: dict[str, Tensor | None] = {}
        theirs = _layers(dense)[0]
        for name, layer in self.layers.items():
            owner = layer.attention if isinstance(layer, ProjectionLayer) else name
            mask = masks.get(f"{owner}.{layer.kept}", {}).get(layer.kept_axis)
            if mask is not None and isinstance(partner := theirs.get(name), ProjectionLayer):
                mask = partner.kept_rows(mask)
            self.kept[name] = None if mask is None else mask.nonzero().flatten()

    def run(self) -> RepairReport:
        available = dict(enumerate(self.frames))
        cache_bytes = round(self.settings.memory_gb * (1 - TARGET_SHARE) * 1e9)
        attentions = {layer.attention for layer in self.layers.values() if isinstance(layer, ProjectionLayer)}
        sites = {name for layer in self.layers.values() for name in _modules(layer)}
        with (
            Replay(self.dense, available, attentions=attentions) as dense,
            Replay(self.pruned, available, sites, cache_bytes, attentions) as pruned,
        ):
            theirs, ours = self._trace(dense, _layers(self.dense)[0]), self._trace(pruned, self.layers)
            steps = self._steps(theirs, ours)
            sampling = Sampling(self.settings.seed)
            for step in steps:
                total = theirs.positions[_map(step)] * len(self.frames)
                sampling.rate[step.name] = min(1.0, self.settings.positions / total)
            last_step = {name: i for i, step in enumerate(steps) for name in _modules(step)}
            results: list[LayerRepair] = []
            for wave in self._waves(steps, theirs.positions, sampling):
                finished = {step.name: self._finished(step.name) for step in wave}
                missing = [step for step in wave if finished[step.name] is None]
                counts = {step.name: len(theirs.calls[self._source(step)]) for step in missing}
                with failing_together():
                    targets = {}
                    if missing:
                        targets = record_targets(
                            dense, missing, self.kept, counts, self.own, sampling, self.sources, self.weights
                        )
                for step in wave:
                    done = finished[step.name]
                    if done is not None:
                        result, tensors = done
                        put(self.pruned, tensors)
                    else:
                        pairs = pairs_of(theirs.calls[self._source(step)], ours.calls[_map(step)], self.ends)
                        count = len(ours.calls[_map(step)])
                        result = fit_layer(
                            step,
                            pruned,
                            targets.pop(step.name),
                            pairs,
                            count,
                            self._held_out,
                            self.settings.ridge,
                        )
                        self._keep(step, result)
                    for name in _modules(step):
                        if last_step[name] == len(results):
                            pruned.settle(name)
                    results.append(result)
                    self.on_layer(len(results), len(steps))
        kinds = dict(self.pruned.named_modules()) | {name: layer.module for name, layer in self.layers.items()}
        never = [LayerRepair(name, type(kinds[name]).__name__, left=reason) for name, reason in self.left.items()]
        report = RepairReport((*results, *never))
        if self.store is not None:
            self.store.finish(report)
        return report

    def _trace(self, replay: Replay, layers: Mapping[str, Layer]) -> _Trace:
        """Run one frame to see what runs when."""
        trace = _Trace()

        def on_call(observed: Observed) -> None:
            name, output = observed.call.name, observed.output
            if name in layers and isinstance(output, Tensor):
                trace.calls[name].append(observed.call)
                trace.positions[name] += output.numel() // output.shape[layers[name].channel_axis]

        trace.flow = replay.trace(0, on_call)
        return trace

    def _steps(self, theirs: _Trace, ours: _Trace) -> list[Layer]:
        """Layers in the order in which they first run, and residual sums where they are formed."""
        for name in self.layers:
            if name not in ours.calls:
                self.left[name] = "no calibration frame runs it"
            elif name not in theirs.calls:
                self.left[name] = "no calibration frame runs it in the dense model"
        order = [name for name in ours.calls if name in theirs.calls]
        self._mark_batch_norms(order, ours.calls, ours.flow)
        times: list[tuple[float, Layer]] = []
        for name in order:
            layer = self.layers[name]
            first = ours.calls[name][0].path
            times.append((ours.flow.times[first], layer))
            if (
                isinstance(layer, (LinearLayer, ConvLayer))
                and not isinstance(layer, ProjectionLayer)
                and len(ours.calls[name]) == 1
            ):
                behind = self._batch_norm_behind(name, ours)
                step = ResidualLayer.of(layer, behind)
                met = ours.sum_of(step.last)
                if met is not None and theirs.sum_of(step.last) is not None and len(theirs.calls[name]) == 1:
                    times.append((met - 0.5, step))  # behind the last call that had ended by then
                    self.kept[step.name] = self.kept[name]
        self._find_sources(times, theirs, ours)
        return [step for _, step in sorted(times, key=lambda each: each[0])]

    def _find_sources(self, times: Sequence[tuple[float, Layer]], theirs: _Trace, ours: _Trace) -> None:
        """The last sum of a block that removed ones follow, and what runs behind it, stand for those of the last."""
        for kept, removed in self.ends.items():
            steps = [(time, step) for time, step in times if _map(step).startswith(f"{kept}.")]
            sums = [time for time, step in steps if isinstance(step, ResidualLayer)]
            if not sums:
                continue
            final = [step for time, step in steps if time >= max(sums)]
            entering = [step for step in final if isinstance(step, ResidualLayer)]
            partners = (removed + step.last.removeprefix(kept) for step in entering)
            partner = next((name for name in partners if theirs.sum_of(name) is not None), None)
            if partner is not None:
                self.sources |= {step.name: partner for step in entering}
            for step in final:
                name = removed + step.name.removeprefix(kept)
                if not isinstance(step, ResidualLayer) and name in theirs.calls:
                    self.sources[step.name] = name

    def _source(self, step: Layer) -> str:
        """Layer of the dense model whose calls a step's are compared with."""
        return _map(step) if isinstance(step, ResidualLayer) else self.sources.get(step.name, step.name)

    def _batch_norm_behind(self, name: str, trace: _Trace) -> BatchNormLayer | None:
        if not self.layers[name].to_norm:
            return None
        norms = trace.flow.readers(trace.calls[name][0].path)
        norm = self.layers[min(norms)]
        return norm if len(norms) == 1 and isinstance(norm, BatchNormLayer) else None

    def _mark_batch_norms(self, order: Sequence[str], calls: dict[str, list[Call]], flow: DataFlow) -> None:
        """The mean of what a batch norm alone reads does not matter."""
        norms = {name for name in order if isinstance(self.layers[name], BatchNormLayer)}
        for name in order:
            readers = set().union(*(flow.readers(call.path) for call in calls[name] if call.path in flow.outputs))
            self.layers[name].to_norm = name not in norms and bool(readers) and readers <= norms

    def _waves(self, steps: Sequence[Layer], positions: Mapping[str, int], sampling: Sampling) -> Iterator[list[Layer]]:
        """Layers whose targets fit into memory together."""
        limit = self.settings.memory_gb * TARGET_SHARE * 1e9
        wave: list[Layer] = []
        used = 0.0
        for step in steps:
            groups, _, outputs = step.shape
            size = 4.0 * positions[_map(step)] * sampling.rate[step.name] * len(self.own) * groups * outputs
            if wave and used + size > limit:
                yield wave
                wave, used = [], 0.0
            wave.append(step)
            used += size
        if wave:
            yield wave

    def _held_out(self, index: int, count: int) -> Tensor:
        """Every fourth batch, or every fourth sample where there are few batches."""
        if len(self.frames) >= HELD_OUT_EVERY:
            return torch.full((count,), index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)
        return torch.arange(count) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1

    def _finished(self, name: str) -> tuple[LayerRepair, dict[str, Tensor]] | None:
        """What an earlier run found, if every process can read it."""
        found = self.store.load(name) if self.store is not None else None
        return None if anywhere(found is None) else found

    def _keep(self, layer: Layer, result: LayerRepair) -> None:
        tensors = layer.tensors if not result.left else {}
        if is_distributed():
            for tensor in tensors.values():
                dist.broadcast(tensor, 0)
        if self.store is not None:
            self.store.save(result, tensors)


def _map(step: Layer) -> str:
    """Module whose inputs a step is about."""
    return step.map.name if isinstance(step, ResidualLayer) else step.name


def _modules(step: Layer) -> tuple[str, ...]:
    """Modules that a step changes."""
    if isinstance(step, ResidualLayer):
        return tuple({step.map.name, step.last})
    return (step.attention if isinstance(step, ProjectionLayer) else step.name,)


def _layers(model: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """Layers that can be refitted by name, and why others that have weights cannot."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
    layers: dict[str, Layer] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        layer = layer_of(name, module)
        shared = {other for p in module.parameters(recurse=False) for other in owners[id(p)]} - {name}
        if layer is None and not shared and (projections := projections_of(name, module)):
            layers |= {projection.name: projection for projection in projections}
        elif layer is None:
            if next(module.parameters(recurse=False), None) is not None:
                left[name] = f"parameters of a {type(module).__name__} are not refitted"
        elif shared:
            left[name] = f"it shares its weights with {min(shared)}"
        else:
            layers[name] = layer
    return layers, left


def _check_same(dense: nn.Module, pruned: nn.Module, plan: PruningPlan) -> None:
    """The pruned model must have the shapes that the plan leaves of the dense one."""
    masks = keep_masks(dense, plan)
    tensors = dict((*dense.named_parameters(), *dense.named_buffers()))
    for name, tensor in (*pruned.named_parameters(), *pruned.named_buffers()):  # shared modules by their first name
        expected = list(tensors[name].shape) if name in tensors else []
        for axis, mask in masks.get(name, {}).items():
            expected[axis] = int(mask.sum())
        if name not in tensors or list(tensor.shape) != expected:
            raise MdpError(
                f"repair: {name} of the pruned model has shape {tuple(tensor.shape)}, the plan leaves "
                f"{tuple(expected) if name in tensors else 'nothing of that name'}; cut the model with this plan first"
            )
