"""Streaming training that can be stopped at any checkpoint: position in the data, memory and random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, LOOPS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from .memory import MemoryState
from .sampler import StreamBatchSampler

STATE_KEY = "stream_state"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without DDP around it."""
    return model.module if is_model_wrapper(model) else model


def random_state() -> dict[str, Any]:
    """State of all random generators of this process, as plain values and tensors."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - third-party transforms draw from it
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    state = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go on with what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    key = np.asarray(state["numpy"]["state"]["key"], np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@LOOPS.register_module()
class StreamTrainLoop(IterBasedTrainLoop):
    """Iteration-based training that resumes in the middle of its streams.

    MMEngine would load and throw away every batch of the past; here the batch sampler starts at the right place. With
    `StreamStateHook` the memory of the streams and the random generators go on too, so that with ``num_workers=0`` one
    process continues exactly as if it had never stopped. Of several ranks only the first keeps its memory; the others
    fill theirs again within ``memory_len / topk_proposals`` frames.
    """

    stream_state: dict[str, Any] | None = None

    def run(self) -> nn.Module:
        """Train until ``max_iters``."""
        sampler = self.dataloader.batch_sampler
        if self._iter == 0 or not isinstance(sampler, StreamBatchSampler):
            return super().run()
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        sampler.start = self._iter
        self.runner.logger.info(f"the streams go on at iteration {self._iter}")
        batches = iter(self.dataloader)
        self._restore()
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(batches))
            self._decide_current_val_interval()
            last = self._iter == self._max_iters
            if self.runner.val_loop is not None and self._iter >= self.val_begin and (
                self._iter % self.val_interval == 0 or last
            ):
                self.runner.val_loop.run()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def _restore(self) -> None:
        state, self.stream_state = self.stream_state, None
        if state is None:
            return
        memory = state["memory"]
        if memory is not None and self.runner.rank == 0:
            model = unwrapped(self.runner.model)
            device = next(model.parameters()).device
            model.memory = MemoryState(**{name: value.to(device) for name, value in memory.items()})
        set_random_state(state["random"])


@HOOKS.register_module()
class StreamStateHook(Hook):
    """Keep memory and random generators of the first rank in checkpoints, for `StreamTrainLoop` to go on with."""

    priority = "VERY_LOW"

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the state."""
        memory = getattr(unwrapped(runner.model), "memory", None)
        kept = None if memory is None else {k: v.detach().cpu() for k, v in memory._asdict().items()}
        checkpoint[STATE_KEY] = {"memory": kept, "random": random_state()}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Hand the state to the loop, which uses it if the training is resumed."""
        loop = runner.train_loop if runner._train_loop is not None else None
        if isinstance(loop, StreamTrainLoop):
            loop.stream_state = checkpoint.get(STATE_KEY)
