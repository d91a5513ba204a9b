"""Let checkpoints of MMEngine load with ``weights_only=True``, the default of ``torch.load`` since torch 2.6.

Importing this module is enough: it registers what such a checkpoint holds besides tensors and plain values, for
``Runner.load_checkpoint`` and ``Runner.resume`` as for this project's own loading.
"""
from __future__ import annotations

import importlib
import pickle
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

MULTIARRAY_NAMES = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since numpy 2


def safe_globals() -> list[Any]:
    """Classes and functions of MMEngine's log buffers and the numpy arrays in them; none can run foreign code."""
    multiarray = importlib.import_module(MULTIARRAY_NAMES[int(np.__version__.split(".")[0]) >= 2])
    dtypes = {type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool", "uint8")}
    arrays = [(getattr(multiarray, function), f"{module}.{function}")
              for module in MULTIARRAY_NAMES for function in ("_reconstruct", "scalar")]
    return [HistoryBuffer, (_history_method, "builtins.getattr"), *arrays, np.ndarray, np.dtype, *dtypes]


def register_safe_globals() -> None:
    """Allow `safe_globals` in ``torch.load``; older versions of torch cannot be told, and need not be."""
    if torch.__version__ >= (2, 6):
        torch.serialization.add_safe_globals(safe_globals())


def _history_method(owner: Any, name: str) -> Any:
    """Stands in for ``getattr`` while unpickling: MMEngine's log buffers name their own methods with it."""
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise pickle.UnpicklingError(f"refused getattr({owner!r}, {name!r})")
    return getattr(owner, name)


register_safe_globals()
