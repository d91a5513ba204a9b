"""torch's own attention, without its fused form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_fused_layers() -> Iterator[None]:
    """Keep `torch.nn.MultiheadAttention` and the encoder layers around it from one operator for everything inside.

    It calls none of their modules and has no ONNX form.
    """
    backend = getattr(torch.backends, "mha", None)  # since PyTorch 2.3
    before = backend.get_fastpath_enabled() if backend else True
    try:
        if backend:
            backend.set_fastpath_enabled(False)
        yield
    finally:
        if backend:
            backend.set_fastpath_enabled(before)
