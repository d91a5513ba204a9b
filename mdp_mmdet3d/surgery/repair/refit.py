"""Repair: refit the layers of a pruned model, one after the other, to what the dense model computed; no training."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.surgery.apply import check_fits, keep_masks
from mdp_mmdet3d.surgery.plan import PruningPlan
from mdp_mmdet3d.surgery.repair.data_flow import DataFlow
from mdp_mmdet3d.surgery.repair.fit import fit_layer
from mdp_mmdet3d.surgery.repair.layers import BatchNormLayer, Layer, layer_of
from mdp_mmdet3d.surgery.repair.processes import failing_together, is_distributed
from mdp_mmdet3d.surgery.repair.replay import Call, Frame, Observed, Replay
from mdp_mmdet3d.surgery.repair.settings import LayerRepair, RepairReport, RepairSettings
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
    ridge and change only if that brings the outputs nearer to the dense model's on samples that were held out. In a
    distributed run every process takes its share of the frames and all end with the same weights.

    Args:
        dense: The model that ``plan`` was made for; not changed.
        pruned: `apply_plan` of it.
        plan: What stays.
        frames: Batches; the same list in every process.
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
    _check_same(dense, pruned, plan)
    modes = {module: module.training for model in (dense, pruned) for module in model.modules()}
    state = {name: tensor.detach().clone() for name, tensor in pruned.state_dict().items()}
    try:
        for module in modes:
            module.training = False
        return _Repair(dense, pruned, plan, frames, settings, store, on_layer or (lambda done, total: None)).run()
    except BaseException:
        for name, tensor in pruned.state_dict().items():
            tensor.copy_(state[name])
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode


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
        masks = keep_masks(dense, plan)
        self.layers, self.left = _layers(pruned)
        self.kept: dict[str, Tensor | None] = {}
        for name, layer in self.layers.items():
            mask = masks.get(f"{name}.{layer.kept}", {}).get(layer.kept_axis)
            self.kept[name] = None if mask is None else mask.nonzero().flatten()

    def run(self) -> RepairReport:
        available = dict(enumerate(self.frames))
        sites = set(self.layers)
        cache_bytes = round(self.settings.memory_gb * (1 - TARGET_SHARE) * 1e9)
        with Replay(self.dense, available) as dense, Replay(self.pruned, available, sites, cache_bytes) as pruned:
            dense_calls, positions, _ = self._trace(dense)
            pruned_calls, _, flow = self._trace(pruned)
            order = [name for name in pruned_calls if name in dense_calls]
            self._mark_batch_norms(order, pruned_calls, flow)
            for name in self.layers:
                if name not in pruned_calls:
                    self.left[name] = "no calibration frame runs it"
                elif name not in dense_calls:
                    self.left[name] = "no calibration frame runs it in the dense model"
            sampling = Sampling(self.settings.seed)
            for name in order:
                total = positions[name] * len(self.frames)
                sampling.rate[name] = min(1.0, self.settings.positions / total)
            results: list[LayerRepair] = []
            for wave in self._waves(order, positions, sampling):
                finished = {name: self.store.load(name) if self.store else None for name in wave}
                missing = [self.layers[name] for name in wave if finished[name] is None]
                counts = {layer.name: len(dense_calls[layer.name]) for layer in missing}
                with failing_together():
                    targets = record_targets(dense, missing, self.kept, counts, self.own, sampling) if missing else {}
                for name in wave:
                    layer, done = self.layers[name], finished[name]
                    if done is not None:
                        result, tensors = done
                        put(layer.module, tensors)
                    else:
                        result = fit_layer(
                            layer,
                            pruned,
                            targets.pop(name),
                            pairs_of(dense_calls[name], pruned_calls[name]),
                            len(pruned_calls[name]),
                            self._held_out,
                            self.settings.ridge,
                        )
                        self._keep(layer, result)
                    pruned.settle(name)
                    results.append(result)
                    self.on_layer(len(results), len(order))
        kinds = dict(self.pruned.named_modules())
        never = [LayerRepair(name, type(kinds[name]).__name__, left=reason) for name, reason in self.left.items()]
        report = RepairReport((*results, *never))
        if self.store is not None:
            self.store.finish(report)
        return report

    def _trace(self, replay: Replay) -> tuple[dict[str, list[Call]], dict[str, int], DataFlow]:
        """Calls of the layers in the order of the first, and how many positions their outputs have in a frame."""
        calls: dict[str, list[Call]] = defaultdict(list)
        positions: Counter[str] = Counter()

        def on_call(observed: Observed) -> None:
            name, output = observed.call.name, observed.output
            if name in self.layers and isinstance(output, Tensor):
                calls[name].append(observed.call)
                positions[name] += output.numel() // output.shape[self.layers[name].channel_axis]

        flow = replay.trace(0, on_call)
        return dict(calls), dict(positions), flow

    def _mark_batch_norms(self, order: Sequence[str], calls: dict[str, list[Call]], flow: DataFlow) -> None:
        """The mean of what a batch norm alone reads does not matter."""
        norms = {name for name in order if isinstance(self.layers[name], BatchNormLayer)}
        for name in order:
            readers = set().union(*(flow.readers(call.path) for call in calls[name]))
            self.layers[name].to_norm = name not in norms and bool(readers) and readers <= norms

    def _waves(self, order: Sequence[str], positions: dict[str, int], sampling: Sampling) -> Iterator[list[str]]:
        """Layers whose targets fit into memory together."""
        limit = self.settings.memory_gb * TARGET_SHARE * 1e9
        wave: list[str] = []
        used = 0.0
        for name in order:
            groups, _, outputs = self.layers[name].shape
            size = 4.0 * positions[name] * sampling.rate[name] * len(self.own) * groups * outputs
            if wave and used + size > limit:
                yield wave
                wave, used = [], 0.0
            wave.append(name)
            used += size
        if wave:
            yield wave

    def _held_out(self, index: int, count: int) -> Tensor:
        """Every fourth batch, or every fourth sample where there are few batches."""
        if len(self.frames) >= HELD_OUT_EVERY:
            return torch.full((count,), index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)
        return torch.arange(count) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1

    def _keep(self, layer: Layer, result: LayerRepair) -> None:
        tensors = {name: getattr(layer.module, name).data for name in layer.tensors} if not result.left else {}
        if is_distributed():
            for tensor in tensors.values():
                dist.broadcast(tensor, 0)
        if self.store is not None:
            self.store.save(result, tensors)


def _layers(model: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """Layers that can be refitted by name, and why others that have weights cannot."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
    layers, left = {}, {}
    for name, module in model.named_modules():
        layer = layer_of(name, module)
        shared = {other for p in module.parameters(recurse=False) for other in owners[id(p)]} - {name}
        if layer is None:
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
