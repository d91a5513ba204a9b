"""Let MMEngine checkpoints resume on torch >= 2.6, whose ``torch.load`` refuses unknown classes."""
from __future__ import annotations

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


def register_safe_globals() -> None:
    """Allow the plain data classes that MMEngine stores in a checkpoint's message hub."""
    if not hasattr(torch.serialization, "add_safe_globals"):  # torch < 2.4 has no such list
        return
    numpy_core = getattr(np, "_core", None) or np.core
    allowed = [HistoryBuffer, np.ndarray, np.dtype, numpy_core.multiarray._reconstruct, numpy_core.multiarray.scalar]
    allowed += [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool", "uint8")]
    torch.serialization.add_safe_globals(allowed)


register_safe_globals()
