"""Several processes that repair one model: all end alike, also where one of them fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from mdp_mmdet3d.errors import MdpError


def is_distributed() -> bool:
    """Whether several processes work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def anywhere(flag: bool) -> bool:
    """Whether ``flag`` is set in any process."""
    if not is_distributed():
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise an `MdpError` of the block in every process: the others would wait for the one that failed."""
    error: MdpError | None = None
    try:
        yield
    except MdpError as raised:
        error = raised
    if anywhere(error is not None):
        raise error or MdpError("repair: another process of this run failed; see its message")
