"""Let MMEngine checkpoints resume on torch >= 2.6, whose ``torch.load`` refuses unknown classes."""
from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


def safe_globals() -> list[Any]:
    """The plain data classes that MMEngine stores in a checkpoint's message hub."""
    multiarray = importlib.import_module(
        "numpy._core.multiarray" if np.__version__.startswith("2.") else "numpy.core.multiarray")
    dtypes = {type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool", "uint8")}
    return [HistoryBuffer, np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar, *dtypes]


def register_safe_globals() -> None:
    """Allow `safe_globals` wherever torch keeps such a list (2.4 and later)."""
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals(safe_globals())


register_safe_globals()
