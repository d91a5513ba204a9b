"""Several processes, and training without a GPU, which MMEngine hardly knows."""

from __future__ import annotations

import atexit
import gc

import torch
from mmengine.config import Config

_LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe", "nccl", "watchdog", "timed out")


def prepare_cpu_processes(config: Config) -> None:
    """Make the CPU ready if there is no GPU; otherwise leave everything to MMEngine.

    Numbers below 1e-38 become 0: sharp attention is full of them, and they cost a training step of the small StreamPETR
    a third of its time. Under ``torchrun`` the gloo process group is started.

    Args:
        config: With ``launcher``; gets a ``model_wrapper_cfg`` without the device ids that MMEngine would give.
    """
    if torch.cuda.is_available():
        return
    torch.set_flush_denormal(True)
    if config.get("launcher", "none") != "pytorch":
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
        atexit.register(_end_process_group)
    wrapper = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    config.setdefault("model_wrapper_cfg", wrapper)


def _end_process_group() -> None:
    """Join gloo's threads while Python still runs.

    One that gives back a tensor when the interpreter has ended is unwound through C++ that must not throw: now and then
    a finished process aborted ("terminate called without an active exception") instead of returning its exit code.
    """
    gc.collect()  # a model in a cycle holds the group
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def process_failure(error: RuntimeError) -> str | None:
    """What to tell the user if ``error`` means that another process of this training ended; None if it does not."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    text = str(error)
    if not isinstance(error, torch.distributed.DistError) and not any(sign in text.lower() for sign in _LOST_PEER):
        return None
    return (
        f"process {torch.distributed.get_rank()} of {torch.distributed.get_world_size()} lost another one, which "
        "was killed or failed: its own message says why. Checkpoints are complete; go on with --resume and as many "
        f"processes ({text.strip().splitlines()[-1]})"
    )
