"""Several processes without a GPU, which MMEngine's launcher does not know."""
from __future__ import annotations

import torch
from mmengine.config import Config


def prepare_cpu_processes(config: Config) -> None:
    """Start the gloo process group of ``torchrun`` if there is no GPU; otherwise leave everything to MMEngine.

    Args:
        config: With ``launcher``; gets a ``model_wrapper_cfg`` without the device ids that MMEngine would give.
    """
    if config.get("launcher", "none") != "pytorch" or torch.cuda.is_available():
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    wrapper = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    config.setdefault("model_wrapper_cfg", wrapper)
