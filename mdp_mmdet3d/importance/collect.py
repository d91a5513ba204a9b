"""Collect importance over a stream of frames; resumable frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from rich.progress import Progress
from torch import Tensor, nn

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import read_npz, write_npz
from mdp_mmdet3d.importance.batch_loss import model_loss
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.importance.taylor import TaylorAccumulator
from mdp_mmdet3d.progress import PlainProgress
from mdp_mmdet3d.space.types import PruningSpace

SCHEMA_VERSION = 1


def collect_importance(
    model: nn.Module,
    space: PruningSpace,
    batches: Iterable[Mapping[str, Any]],
    path: str | Path,
    *,
    num_batches: int,
    weights: str,
    data: str = "",
    progress: bool = True,
    losses: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
) -> ImportanceTable:
    """Accumulate the Taylor importance of every element over a stream of frames.

    The model runs in evaluation mode (no dropout, batch norm by its statistics) with the training loss. After every
    frame the sums are saved beside ``path``; a run that was interrupted goes on behind the last frame, after replaying
    the forward pass of the frames of the same stream so that the temporal memory is the same.

    Args:
        model: Dense detector with MMEngine's ``data_preprocessor``, ``forward(mode="loss")`` and ``parse_losses``.
        space: Traced from the model.
        batches: Batches as MMEngine's dataloaders yield them, in stream order, always the same ones.
        path: The finished table is written here.
        num_batches: How many batches to use.
        weights: Where the model's weights come from.
        data: Where the batches come from; like the weights it is kept in the table.
        progress: Show a progress bar, or a line now and then where there is no terminal.
        losses: The scalar to differentiate, of model and batch; `model_loss` by default.

    Raises:
        MdpError: There were no batches, or none had finite gradients.
    """
    losses = losses or model_loss
    partial = Path(path).with_suffix(".partial.npz")
    identity = {
        "schema_version": SCHEMA_VERSION,
        "space": space.hash,
        "weights": weights,
        "data": data,
        "batches": num_batches,
    }
    state = None
    if partial.exists():
        meta, arrays = read_npz(partial, what="partial importance", schema_version=SCHEMA_VERSION)
        state = arrays if {k: meta.get(k) for k in identity} == identity else None
    model.eval()
    if hasattr(model, "reset_memory"):
        model.reset_memory()
    replay: list[Mapping[str, Any]] = []
    with (
        TaylorAccumulator(model, space, state) as accumulator,
        Progress(disable=not (progress and get_console().is_terminal)) as bar,
    ):
        done = accumulator.batches + accumulator.skipped
        task = bar.add_task("importance", total=num_batches, completed=done)
        plain = PlainProgress(bar.console, "importance", num_batches, "frames", done)
        for i, batch in enumerate(batches):
            if i >= num_batches:
                break
            if i < done:
                replay = [*replay, batch] if continues(batch) else [batch]
                continue
            with torch.no_grad():
                for earlier in replay if continues(batch) else ():
                    losses(model, earlier)
            replay = []
            model.zero_grad(set_to_none=True)
            losses(model, batch).backward()
            accumulator.finish_batch()
            write_npz(partial, identity, accumulator.state())
            bar.update(task, advance=1)
            if progress:
                plain(i + 1)
        model.zero_grad(set_to_none=True)
        table = accumulator.table(weights, num_batches, data)
    if table.batches == 0:
        raise MdpError(
            f"importance: {table.skipped} of {table.skipped} batches had a loss or gradient that is not "
            "finite, or there was no data; check the checkpoint and the data set"
        )
    table.save(path)
    partial.unlink(missing_ok=True)
    return table


def continues(batch: Mapping[str, Any]) -> bool:
    """Whether any sample goes on a stream of the previous batch."""
    samples = batch.get("data_samples")
    known = (getattr(sample, "metainfo", {}) for sample in (() if samples is None else samples))
    return any(info.get("prev_exists", False) for info in known)
