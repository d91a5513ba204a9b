"""Training and evaluation without a GPU, which MMEngine hardly knows."""
from __future__ import annotations

import torch
from mmengine.config import Config


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
    wrapper = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    config.setdefault("model_wrapper_cfg", wrapper)
