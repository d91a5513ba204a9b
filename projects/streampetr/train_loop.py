"""Streaming training that can be stopped at any checkpoint: position in the data, memory and random numbers."""

from __future__ import annotations

import random
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from mmengine.dist import all_gather_object
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, LOOPS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor, nn

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


@runtime_checkable
class KeepsStreamMemory(Protocol):
    """A hook with a memory of the streams of its own, which is saved and restored with the detector's."""

    def stream_memory(self) -> MemoryState | None:
        """The memory."""

    def restore_stream_memory(self, memory: MemoryState | None) -> None:
        """Go on with it."""


def rank_state(runner: Runner) -> dict[str, Any]:
    """Memories and random generators of this process, as plain values and tensors on the CPU."""
    model = unwrapped(runner.model)
    # In evaluation the memory is that of other streams.
    memory = model.memory if model.training and hasattr(model, "memory") else None
    hooks = {
        type(hook).__name__: _packed(hook.stream_memory())
        for hook in runner.hooks
        if isinstance(hook, KeepsStreamMemory)
    }
    return {"memory": _packed(memory), "hooks": hooks, "random": random_state()}


def _packed(memory: MemoryState | None) -> dict[str, Tensor] | None:
    return None if memory is None else {k: v.detach().cpu() for k, v in memory._asdict().items()}


def _unpacked(memory: dict[str, Tensor] | None, device: torch.device) -> MemoryState | None:
    return None if memory is None else MemoryState(**{name: value.to(device) for name, value in memory.items()})


@LOOPS.register_module()
class StreamTrainLoop(IterBasedTrainLoop):
    """Iteration-based training that resumes in the middle of its streams.

    MMEngine would load and throw away every batch of the past; here the batch sampler starts at the right place. With
    `StreamStateHook` the memory of the streams and the random generators go on too, so that with ``num_workers=0`` and
    as many processes as before a training continues exactly as if it had never stopped. With another number of
    processes or another batch size the streams are dealt anew and start without memory. A validation that was due at
    the checkpoint is run again, as it follows the checkpoint.
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
        self.runner.model.train()
        self._restore(sampler.batch_size)
        self._validate_if_due()
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(batches))
            self._decide_current_val_interval()
            self._validate_if_due()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def _validate_if_due(self) -> None:
        if (
            self.runner.val_loop is not None
            and self._iter >= self.val_begin
            and (self._iter % self.val_interval == 0 or self._iter == self._max_iters)
        ):
            self.runner.val_loop.run()

    def _restore(self, batch_size: int) -> None:
        states, self.stream_state = (self.stream_state or {}).get("ranks"), None
        if states is None:
            return
        state = states[self.runner.rank] if len(states) == self.runner.world_size else None
        if state is None:
            self.runner.logger.warning(
                f"the checkpoint holds no memory for process {self.runner.rank} of {self.runner.world_size} (it has "
                f"that of {len(states)}): the streams start without memory, the training does not repeat exactly"
            )
            return
        model = unwrapped(self.runner.model)
        device = next(model.parameters()).device
        memory = _unpacked(state["memory"], device)
        if memory is not None and len(memory.embedding) != batch_size:
            self.runner.logger.warning(
                f"the checkpoint was saved with batch_size={len(memory.embedding)}, now it is "
                f"{batch_size}: the streams start without memory"
            )
            return
        model.memory = memory
        for hook in self.runner.hooks:
            if isinstance(hook, KeepsStreamMemory) and type(hook).__name__ in state["hooks"]:
                hook.restore_stream_memory(_unpacked(state["hooks"][type(hook).__name__], device))
        set_random_state(state["random"])


@HOOKS.register_module()
class StreamStateHook(Hook):
    """Keep memories and random generators of all processes in checkpoints, for `StreamTrainLoop` to go on with.

    Only the first process writes checkpoints. The others send it their part when MMEngine's ``CheckpointHook`` is about
    to save; a checkpoint that something else saves has the first one's part only.
    """

    priority = "LOW"  # before CheckpointHook

    def __init__(self) -> None:
        self._gathered: tuple[int, list[dict[str, Any] | None]] | None = None

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Collect the parts of all processes if a checkpoint comes."""
        if runner.world_size > 1 and any(_saves_now(hook, runner) for hook in runner.hooks):
            self._gathered = (runner.iter, all_gather_object(rank_state(runner)))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the state."""
        states: list[dict[str, Any] | None] = [rank_state(runner)] + [None] * (runner.world_size - 1)
        if self._gathered is not None and self._gathered[0] == runner.iter:
            states = self._gathered[1]
        checkpoint[STATE_KEY] = {"ranks": states}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Hand the state to the loop, which uses it if the training is resumed."""
        loop = runner.train_loop if runner._train_loop is not None else None
        if isinstance(loop, StreamTrainLoop):
            loop.stream_state = checkpoint.get(STATE_KEY)


def _saves_now(hook: Hook, runner: Runner) -> bool:
    return (
        isinstance(hook, CheckpointHook)
        and not hook.by_epoch
        and (
            hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
            or (hook.save_last and hook.is_last_train_iter(runner))
        )
    )
