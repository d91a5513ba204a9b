"""Pruning during training: importance, plan, masks; the live model keeps its shapes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import broadcast_object_list, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from mdp_mmdet3d.adapters import adapter_of
from mdp_mmdet3d.checkpoint.check import meta_of, plan_hash_of
from mdp_mmdet3d.errors import FileFormatError, MdpError, StructureMismatchError
from mdp_mmdet3d.files import read_json
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.latency.predict import LatencyModel, MeasuredNetwork
from mdp_mmdet3d.latency.table import LatencyTable
from mdp_mmdet3d.runner.importance_hook import Collection, space_of, unwrapped
from mdp_mmdet3d.runner.live import find_live_plan, repair_live
from mdp_mmdet3d.runner.optimise import PlanSearch
from mdp_mmdet3d.runner.outputs import CHECKPOINT_FILE, CONFIG_FILE, PLAN_FILE, new_pruned_model
from mdp_mmdet3d.runner.repairing import sentence
from mdp_mmdet3d.runner.settings import LossSettings, PruneSettings, budget_ms, parse_budget
from mdp_mmdet3d.space.types import BlockKind, PruningSpace
from mdp_mmdet3d.surgery.apply import apply_plan, keep_masks
from mdp_mmdet3d.surgery.masking import silence_block
from mdp_mmdet3d.surgery.plan import PruningPlan

PLAN_INFO = "mdp_plan"  # name in MMEngine's message hub under which the latest plan is found


def load_latency(folder: Path, space: PruningSpace) -> tuple[LatencyModel, float]:
    """Latency model that ``tools/prune.py`` left in its work directory.

    Args:
        folder: With ``latency_table.json`` and ``whole_latency.json`` of the device that counts.
        space: What may be pruned.

    Returns:
        The model and the measured dense latency in milliseconds.

    Raises:
        FileFormatError: A file is missing or damaged.
        StructureMismatchError: It was measured for another model.
    """
    path = folder / "whole_latency.json"
    data = read_json(path, what="whole-network latency", schema_version=1)
    try:
        found = data["identity"]["fingerprint"]
        networks = [MeasuredNetwork(p["widths"], tuple(p["removed"]), p["stages_ms"]) for p in data["points"]]
    except (KeyError, TypeError) as error:
        raise FileFormatError(
            f"whole-network latency {path} is damaged ({error!r}); run tools/prune.py again"
        ) from error
    if found != space.model_digest:
        raise StructureMismatchError(
            f"{path} was measured for another model (digest {found}, this model has "
            f"{space.model_digest}); measure this one with tools/prune.py"
        )
    table = LatencyTable.load(folder / "latency_table.json")
    return LatencyModel.fit(space, table, networks), sum(networks[0].engines_ms.values())


def solve_plan(
    space: PruningSpace, importance: ImportanceTable, latency: LatencyModel, budget: float, time_limit_s: float
) -> PruningPlan:
    """Best plan within ``budget`` milliseconds, from measured and, where there are none, interpolated latencies.

    Raises:
        InfeasibleBudgetError: No structure meets the budget.
    """
    search = PlanSearch(space, importance, latency, None, None, budget, time_limit_s)
    plan = search.solve()
    return replace(plan, info={**plan.info, "interpolated_entries": len(search.interpolated_entries)})


def _uniform(space: PruningSpace) -> ImportanceTable:
    """Every element is worth the same."""
    scores: dict[str, dict[str | None, np.ndarray]] = {
        d.name: {source.block: np.ones((d.copies, d.size)) for source in d.sources} for d in space.dimensions
    }
    return ImportanceTable(space.model_digest, "none", 1, 0, 1, scores)


class LiveMask:
    """Keeps at zero what a plan cuts, in a model that goes on training; no shape and no module changes.

    Args:
        model: The dense model, unwrapped.
        plan: What stays.
        space: Names the parts of removed layers.
    """

    def __init__(self, model: nn.Module, plan: PruningPlan, space: PruningSpace) -> None:
        self.model = model
        tensors = dict(model.named_parameters())
        self._cuts: list[tuple[Tensor, int, Tensor]] = [
            (tensors[name], axis, (~mask).nonzero().flatten().to(tensors[name].device))
            for name, masks in keep_masks(model, plan).items()
            if name in tensors
            for axis, mask in masks.items()
        ]
        layers = {name for name, block in plan.removed.items() if block.kind is BlockKind.LAYER}
        removed = set(plan.removed) - layers
        self._silent = [block for block in space.blocks if block.name in removed or block.parent in layers]
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the masked weights again; call after every optimizer step."""
        for tensor, axis, index in self._cuts:
            tensor.index_fill_(axis, index, 0.0)
        for block in self._silent:
            silence_block(self.model, block)


def _is_written(folder: Path, plan: PruningPlan) -> bool:
    """Whether the folder holds this plan, a pruned checkpoint of it and the config."""
    try:
        stored = PruningPlan.load(folder / PLAN_FILE).hash
        checkpoint = torch.load(folder / CHECKPOINT_FILE, map_location="cpu", weights_only=True)
        saved = plan_hash_of(meta_of(checkpoint, CHECKPOINT_FILE), CHECKPOINT_FILE)
    except (MdpError, OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError):
        return False
    return stored == saved == plan.hash and (folder / CONFIG_FILE).is_file()


@HOOKS.register_module()
class MDPPruneHook(Hook):
    """Find the plan of a latency budget during training, in one pass or along a falling budget.

    Step k of a schedule collects importance over ``steps_each`` optimizer steps and solves for the budget
    ``dense * (target / dense) ** (k / num_prunings)``. What the plan leaves is repaired: refitted to what the model
    computed before, where ``prune.repair`` is not False. What it cuts is masked (kept at zero) while training goes on.
    After the last one the hook writes ``plan.json``, ``pruned.pth`` and ``pruned_config.py`` to the work directory;
    the live model is never reshaped. Fine-tune with ``tools/train.py WORK_DIR/pruned_config.py``.

    Args:
        latency_dir: Work directory of a ``tools/prune.py`` run of this model on the target device.
        budget: As in ``prune.budget``; that one by default.
        steps_each: Optimizer steps per pruning.
        num_prunings: Prunings of the schedule; 1 prunes in one pass.
        begin: Iteration from which on importance is collected.
        stop: End the training after the last pruning.
        importance: As ``prune.importance``: ``"loss"``, or a dict with this type, measures what every part costs the
            loss at each pruning, which takes minutes, on the first process while others wait.
    """

    priority = "NORMAL"
    state_key = "mdp_prune"

    def __init__(
        self,
        latency_dir: str,
        budget: float | str | None = None,
        steps_each: int = 64,
        num_prunings: int = 1,
        begin: int = 0,
        stop: bool = True,
        importance: str | Mapping[str, Any] = "taylor",
    ) -> None:
        for name, value, least in (
            ("steps_each", steps_each, 1),
            ("num_prunings", num_prunings, 1),
            ("begin", begin, 0),
        ):
            if type(value) is not int or value < least:
                raise MdpError(f"MDPPruneHook: {name}={value!r} must be a whole number of at least {least}")
        if budget is not None:
            parse_budget(budget)
        self.latency_dir = Path(latency_dir)
        self.budget = budget
        self.steps_each = steps_each
        self.num_prunings = num_prunings
        self.begin = begin
        self.stop = stop
        self._loss_settings = LossSettings.from_config(importance)
        self.plan: PruningPlan | None = None
        self._done = 0
        self._collection: Collection | None = None
        self._mask: LiveMask | None = None
        self._loaded: Mapping[str, Any] | None = None

    def before_train(self, runner: Runner) -> None:
        """Read the latencies, check the budget, and take up a resumed schedule.

        Raises:
            InfeasibleBudgetError: No structure meets the budget.
        """
        self._settings = PruneSettings.from_config(runner.cfg.get("prune", {}))
        self._space = space_of(runner.model, runner.cfg, self._settings)
        self._latency, self._dense_ms = load_latency(self.latency_dir, self._space)
        for doubt in self._latency.doubts:
            runner.logger.warning(doubt)
        self._adapter = None
        if self._settings.repairing is not None or self._loss_settings is not None:
            self._adapter = adapter_of(runner.cfg, self._settings.input_shape, self._settings.adapter)
            self._adapter.importance_loader()  # data that is not there must not show only after hours of training
        self._target_ms = budget_ms(self.budget if self.budget is not None else self._settings.budget, self._dense_ms)
        # An impossible budget must not show only after the importance was collected.
        solve_plan(self._space, _uniform(self._space), self._latency, self._target_ms, self._settings.time_limit_s)
        state = self._loaded if runner.iter > 0 else None
        self._loaded = None
        if state is None:
            return
        self._done = state["done"]
        if state["plan"] is not None:
            self._set_plan(runner, PruningPlan.from_dict(state["plan"]))
        if state["collection"] is not None:
            self._collection = Collection(runner.model, self._space, self.steps_each, state["collection"])
        if self._done == self.num_prunings:
            if self.plan is not None and is_main_process() and not _is_written(Path(runner.work_dir), self.plan):
                self._write(runner, self.plan)
            if self.stop:
                runner.train_loop.stop_training = True

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Start collecting when it is time."""
        if self._collection is None and self._done < self.num_prunings and runner.iter >= self.begin:
            self._collection = Collection(runner.model, self._space, self.steps_each)
        if self._collection is not None:
            self._collection.before_iter(runner)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Mask, book the step, and prune after the last one."""
        if self._mask is not None:
            self._mask.apply()
        if self._collection is None:
            return
        self._collection.after_iter(runner)
        if self._collection.done:
            importance = self._collection.finish("training")
            self._collection = None
            self._prune(runner, importance)

    def budget_of(self, pruning: int) -> float:
        """Budget in milliseconds of the ``pruning``-th of ``num_prunings``, counted from 1."""
        return self._dense_ms * (self._target_ms / self._dense_ms) ** (pruning / self.num_prunings)

    def _prune(self, runner: Runner, importance: ImportanceTable) -> None:
        shared: list[Any] = [None]
        if is_main_process():
            budget = self.budget_of(self._done + 1)
            shared = [self._solve(runner, importance, budget).to_dict()]
        broadcast_object_list(shared)
        self._done += 1
        plan = PruningPlan.from_dict(shared[0])
        repairing = self._settings.repairing
        if repairing is not None and self._adapter is not None:
            report = repair_live(unwrapped(runner.model), plan, self._adapter, repairing)
            runner.logger.info(f"repair: {sentence(report)}")
        self._set_plan(runner, plan)
        runner.logger.info(
            f"pruning {self._done} of {self.num_prunings}: {plan.info['predicted_ms']:.1f} of "
            f"{plan.info['budget_ms']:.1f} ms, {len(plan.cuts)} dimensions narrowed, "
            f"{len(plan.removed)} blocks removed"
        )
        if self._done == self.num_prunings:
            if is_main_process():
                self._write(runner, plan)
            if self.stop:
                runner.train_loop.stop_training = True

    def _solve(self, runner: Runner, importance: ImportanceTable, budget: float) -> PruningPlan:
        limit = self._settings.time_limit_s
        if self._loss_settings is None or self._adapter is None:
            return solve_plan(self._space, importance, self._latency, budget, limit)
        return find_live_plan(
            unwrapped(runner.model),
            PlanSearch(self._space, importance, self._latency, None, None, budget, limit),
            self._adapter,
            self._loss_settings,
            Path(runner.work_dir) / f"pruning_{self._done + 1}",
            f"iteration {runner.iter + 1}",
            runner.logger.info,
            # Repair takes all processes, and only one is here.
            self._settings.repairing if get_world_size() == 1 else None,
        )

    def _set_plan(self, runner: Runner, plan: PruningPlan) -> None:
        self.plan = plan
        self._mask = LiveMask(unwrapped(runner.model), plan, self._space)
        runner.message_hub.update_info(PLAN_INFO, plan.to_dict())

    def _write(self, runner: Runner, plan: PruningPlan) -> None:
        pruned = apply_plan(copy.deepcopy(unwrapped(runner.model)), plan)
        classes = runner.cfg.get("class_names") or runner.train_dataloader.dataset.metainfo["classes"]
        weights = f"{runner.experiment_name}@iter{runner.iter + 1}"
        config = copy.deepcopy(runner.cfg)
        config.custom_hooks = [h for h in config.get("custom_hooks") or () if h.get("type") != type(self).__name__]
        with new_pruned_model(runner.work_dir, pruned, plan, weights, config, classes):
            pass  # nothing else belongs to a plan that is found while training

    def after_train(self, runner: Runner) -> None:
        """Say so if the training was too short."""
        if self._collection is not None:
            runner.logger.warning(
                f"the schedule is incomplete: {self._done} of {self.num_prunings} prunings were done "
                "when the training ended; nothing was written"
            )
            self._collection.accumulator.close()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the place in the schedule."""
        checkpoint[self.state_key] = {
            "done": self._done,
            "plan": self.plan.to_dict() if self.plan is not None else None,
            "collection": self._collection.state() if self._collection is not None else None,
        }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Remember the place for `before_train`, in case the training is resumed."""
        self._loaded = checkpoint.get(self.state_key)
