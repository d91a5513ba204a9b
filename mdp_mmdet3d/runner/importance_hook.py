"""Importance collected while a detector trains, with any optimizer wrapper and number of processes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from mdp_mmdet3d.adapters import adapter_of
from mdp_mmdet3d.errors import MdpError, StructureMismatchError
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.importance.taylor import TaylorAccumulator
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.space.types import PruningSpace


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without DDP around it."""
    return model.module if is_model_wrapper(model) else model


def space_of(model: nn.Module, config: Config, settings: PruneSettings) -> PruningSpace:
    """Pruning space of a model that is being trained; the model is not touched."""
    adapter = adapter_of(config, settings.input_shape, settings.adapter)
    with torch.no_grad():
        return adapter.trace(copy.deepcopy(unwrapped(model)).eval(), settings.space_options)


def loss_scale(runner: Runner) -> float:
    """Factor that mixed precision multiplies the loss with at the moment."""
    scaler = getattr(runner.optim_wrapper, "loss_scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


class Collection:
    """Importance over a number of optimizer steps, as a hook needs it.

    A step is one batch: the micro-batches of gradient accumulation and the shares of all processes together, so that
    two processes book what one would on the same data. Steps that are not finite are skipped and counted.

    Args:
        model: The model that is trained, possibly wrapped.
        space: Traced from it.
        steps: Optimizer steps to collect.
        state: What `state` returned, to go on.

    Raises:
        StructureMismatchError: The state is that of another space.
    """

    def __init__(
        self, model: nn.Module, space: PruningSpace, steps: int, state: Mapping[str, Any] | None = None
    ) -> None:
        if state is not None and state["space"] != space.hash:
            raise StructureMismatchError(
                f"the checkpoint holds importance of another model or pruning space ({state['space']}, now "
                f"{space.hash}); resume with the config it was saved with"
            )
        arrays = {k: v.numpy() for k, v in state["sums"].items()} if state is not None else None
        self.space = space
        self.steps = steps
        self.accumulator = TaylorAccumulator(unwrapped(model), space, arrays)
        self._scale = 1.0

    @property
    def done(self) -> bool:
        """Whether all steps were seen."""
        return self.accumulator.batches + self.accumulator.skipped >= self.steps

    def before_iter(self, runner: Runner) -> None:
        """Note the loss scale, which the optimizer step may change."""
        self._scale = loss_scale(runner)

    def after_iter(self, runner: Runner) -> None:
        """Book the step if the iteration ended one."""
        if runner.optim_wrapper.should_update():
            self.accumulator.finish_batch(self._scale, _mean_over_ranks if runner.world_size > 1 else None)

    def state(self) -> dict[str, Any]:
        """Sums so far, as plain values and tensors."""
        sums = {k: torch.from_numpy(np.asarray(v)) for k, v in self.accumulator.state().items()}
        return {"space": self.space.hash, "sums": sums}

    def finish(self, weights: str) -> ImportanceTable:
        """Stop listening.

        Raises:
            MdpError: No step was finite.
        """
        self.accumulator.close()
        table = self.accumulator.table(weights, self.steps)
        if table.batches == 0:
            raise MdpError(
                f"importance: none of {table.skipped} optimizer steps had finite gradients; lower the "
                "learning rate or check the data"
            )
        return table


@HOOKS.register_module()
class ImportanceHook(Hook):
    """Collect importance in ordinary training and write it as ``importance.npz``; survives resuming.

    The space is that of the config's ``prune`` section, as in ``tools/prune.py``, which accepts the file for the same
    weights and number of frames.

    Args:
        num_steps: Optimizer steps to collect.
        begin: Iteration from which on they count.
        out: File, relative to the work directory.
        weights: How the table calls the weights.
    """

    priority = "NORMAL"
    state_key = "mdp_importance"

    def __init__(self, num_steps: int, begin: int = 0, out: str = "importance.npz", weights: str = "training") -> None:
        if num_steps < 1 or begin < 0:
            raise MdpError(f"ImportanceHook: num_steps={num_steps} must be at least 1 and begin={begin} at least 0")
        self.num_steps = num_steps
        self.begin = begin
        self.out = out
        self.weights = weights
        self._collection: Collection | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._finished = False

    def before_train(self, runner: Runner) -> None:
        """Trace the pruning space, and take up a resumed collection."""
        self._space = space_of(runner.model, runner.cfg, PruneSettings.from_config(runner.cfg.get("prune", {})))
        state = self._loaded if runner.iter > 0 else None
        self._loaded = None
        if state is not None:
            self._finished = state["finished"]
            if state["collection"] is not None:
                self._collection = Collection(runner.model, self._space, self.num_steps, state["collection"])

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Start when it is time."""
        if self._collection is None and not self._finished and runner.iter >= self.begin:
            self._collection = Collection(runner.model, self._space, self.num_steps)
        if self._collection is not None:
            self._collection.before_iter(runner)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Book the step; write the table after the last one."""
        if self._collection is None:
            return
        self._collection.after_iter(runner)
        if self._collection.done:
            table = self._collection.finish(self.weights)
            self._collection, self._finished = None, True
            if is_main_process():
                table.save(Path(runner.work_dir) / self.out)
            runner.logger.info(f"importance of {table.batches} steps ({table.skipped} skipped) written to {self.out}")

    def after_train(self, runner: Runner) -> None:
        """Say so if the training was too short."""
        if self._collection is not None:
            runner.logger.warning(
                f"importance is incomplete, {self.out} was not written: the training ended before "
                f"{self.num_steps} optimizer steps were collected"
            )
            self._collection.accumulator.close()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the sums."""
        collection = self._collection.state() if self._collection is not None else None
        checkpoint[self.state_key] = {"finished": self._finished, "collection": collection}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Remember the sums for `before_train`, in case the training is resumed."""
        self._loaded = checkpoint.get(self.state_key)


def _mean_over_ranks(values: Tensor) -> Tensor:
    all_reduce(values, op="mean")
    return values
