"""Let MMEngine checkpoints load on torch >= 2.6, whose ``torch.load`` refuses whatever it does not know."""

from __future__ import annotations

import importlib
import pickle
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

_STATISTICS = ("min", "max", "mean", "current")


def _history_method(owner: Any, name: str) -> Any:
    """Stands in for ``getattr`` while unpickling: MMEngine's log buffers name their own methods with it."""
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise pickle.UnpicklingError(f"refused getattr({owner!r}, {name!r})")
    return getattr(owner, name)


def safe_globals() -> list[Any]:
    """What MMEngine stores in a checkpoint's message hub besides tensors and plain values.

    Returns:
        Classes, and (object, name) pairs for those whose name in the file differs from their own; for
        ``torch.serialization.safe_globals``.
    """
    multiarray = importlib.import_module(
        "numpy._core.multiarray" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "numpy.core.multiarray"
    )
    dtypes = {type(np.dtype(name)) for name in ("f8", "f4", "f2", "i8", "i4", "?", "u1", "U1", "S1")}
    numpy_functions = [
        (getattr(multiarray, function), f"numpy.{core}.multiarray.{function}")
        for function in ("_reconstruct", "scalar")
        for core in ("core", "_core")
    ]
    return [HistoryBuffer, (_history_method, "builtins.getattr"), np.ndarray, np.dtype, *numpy_functions, *dtypes]


def register_safe_globals() -> None:
    """Allow `safe_globals` in every later ``torch.load``; torch before 2.6 loads without such a list."""
    if torch.__version__ >= (2, 6):
        torch.serialization.add_safe_globals(safe_globals())
