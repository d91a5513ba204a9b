"""The loss of pruned models, frame by frame, on always the same frames; what was measured is kept in a file."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import read_npz, write_npz
from mdp_mmdet3d.importance.batch_norm import batch_norms, reestimate_batch_norm
from mdp_mmdet3d.importance.collect import continues
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.plan import PruningPlan

SCHEMA_VERSION = 1
STREAM_FRAMES = 8
"""Frames from the start of a stream: enough for the memory to count, and leaves room for other streams."""
LEAST_FRAMES = 4
DENSE = "dense"
_SAME = 1e-4  # relative: the same frames, weights and code, on another processor

Batch = Mapping[str, Any]
Losses = Callable[[nn.Module, Batch], Tensor]
Statistics = dict[str, tuple[Tensor, Tensor]]


def stream_pieces(batches: Iterable[Batch], length: int = STREAM_FRAMES) -> Iterator[list[Batch]]:
    """The first ``length`` batches of every stream; of data that is no stream, every batch by itself."""
    piece: list[Batch] = []
    for batch in batches:
        if piece and not continues(batch):
            yield piece
            piece = []
        if len(piece) < length and (piece or not continues(batch)):
            piece.append(batch)
    if piece:
        yield piece


class LossProbe:
    """Measures what plans do to the loss.

    Every model, the dense one too, gets the batch-norm statistics of the frames that it is measured on, and equal
    random numbers, so that differences are those of the cut alone. With ``repair`` pruned models are repaired instead,
    and the dense one stays as it is: the difference is what cannot be repaired. Frames come in rounds of whole pieces
    of streams; the memory starts empty with every round.

    Args:
        model: The dense model; not changed.
        batches: Batches with ground truth in stream order, always the same ones.
        losses: The scalar, of model and batch.
        path: What was measured is kept there after every plan, and reused.
        identity: What the losses depend on besides the plan: weights, data, settings.
        round_frames: Batches of a round, at least; it ends with a piece.
        max_frames: Batches of all rounds, at most.
        repair: Refits a pruned model in place, given its plan; what it depends on is part of ``identity``.
        say: Receives a line where something was not as expected.

    Raises:
        MdpError: There are too few batches, or the dense loss is not finite on them.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        losses: Losses,
        path: str | Path,
        identity: Mapping[str, Any],
        *,
        round_frames: int,
        max_frames: int,
        repair: Callable[[nn.Module, PruningPlan], Any] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model = copy.deepcopy(model).eval()
        self.losses = losses
        self.repair = repair
        self.path = Path(path)
        self.identity = {
            "schema_version": SCHEMA_VERSION,
            **identity,
            "round_frames": round_frames,
            "stream_frames": STREAM_FRAMES,
        }
        self._rounds = _rounds(stream_pieces(batches), round_frames, max_frames)
        self.rounds = 0
        self._pieces = np.zeros(0, dtype=int)
        self._batches: list[list[Batch]] = []
        self._statistics: list[Statistics] = []
        self._known = self._read()
        self._found: dict[str, np.ndarray] = {}
        self._say = say
        if not self.more_frames():
            raise MdpError(
                f"values in units of loss need at least {LEAST_FRAMES} frames with ground truth, there are none"
            )
        if self.frames < LEAST_FRAMES:
            raise MdpError(
                f"values in units of loss need at least {LEAST_FRAMES} frames with ground truth, the importance data "
                f"has {self.frames}; give it more, or set prune.importance='taylor'"
            )

    @property
    def frames(self) -> int:
        """Frames that are measured on: those of the first `rounds`."""
        return sum(map(len, self._batches[: self.rounds]))

    @property
    def pieces(self) -> np.ndarray:
        """(frames,) piece of a stream that each frame is of."""
        return self._pieces[: self.frames]

    @contextmanager
    def same_frames_afterwards(self) -> Iterator[None]:
        """What `more_frames` takes in the block is given back behind it, and costs nothing to take again."""
        rounds = self.rounds
        try:
            yield
        finally:
            self.rounds = rounds

    def more_frames(self) -> bool:
        """Take another round of frames; False where the data or the limit is at its end."""
        if self.rounds < len(self._batches):
            self.rounds += 1
            return True
        with seeded(len(self._batches)):  # augmentation too must not depend on what was measured in between
            found = next(self._rounds, None)
        if found is None:
            return False
        batches = [batch for piece in found for batch in piece]
        last = int(self._pieces[-1]) + 1 if len(self._pieces) else 0
        self._pieces = np.append(self._pieces, [last + i for i, piece in enumerate(found) for _ in piece])
        if not self._batches:
            self._order = _call_order(self.model, lambda: self._forward(self.model, batches[0]))
            self._ends_early = self._may_end_early(batches)
        self._batches.append(batches)
        reference = copy.deepcopy(self.model)
        if self.repair is None:
            self._reestimate(reference, batches)
        self._statistics.append(_statistics(reference))
        dense = self._run(reference, batches)
        bad = np.flatnonzero(~np.isfinite(dense))
        if len(bad):
            raise MdpError(
                f"the loss of the dense model is {dense[bad[0]]} on frame {self.frames + bad[0]} of the importance "
                "data; check the checkpoint and the data set"
            )
        self.rounds += 1
        self._found[DENSE] = np.append(self._found.get(DENSE, np.zeros(0)), dense)
        known = self._known.get(DENSE, np.zeros(0))[: self.frames]
        if not np.allclose(known, self._found[DENSE][: len(known)], rtol=_SAME, atol=_SAME):
            self._say(f"{self.path.name} is of other data or weights: measured again")
            self._known = {}
        return True

    @property
    def _dense(self) -> np.ndarray:
        return self._found[DENSE][: self.frames]

    @property
    def dense_loss(self) -> float:
        """Mean over the frames."""
        return float(self._dense.mean())

    def change(self, plan: PruningPlan) -> np.ndarray:
        """Loss of the pruned model minus that of the dense model, (frames,); measured where it is not known yet.

        Raises:
            MdpError: The pruned model's loss is not finite.
        """
        found = self._kept(plan.hash)
        if len(found) < self.frames:
            pruned = apply_plan(copy.deepcopy(self.model), plan)
            if self.repair is not None:
                with seeded(0):
                    self.repair(pruned, plan)
            start = 0
            for batches, statistics in zip(self._batches[: self.rounds], self._statistics):
                if start >= len(found):
                    if self.repair is None:
                        self._set_statistics(pruned, plan, batches, statistics)
                    found = np.append(found, self._run(pruned, batches))
                start += len(batches)
            self._check(plan, found)
        self._keep(plan.hash, found)
        return found - self._dense

    def change_finished(self, plan: PruningPlan, how: str, build: Callable[[], nn.Module]) -> np.ndarray:
        """As `change`, of a pruned model as ``build`` returns it, which is called only where that is not known yet.

        Args:
            plan: What was cut.
            how: What else the model depends on.
            build: Returns the pruned model, e.g. repaired.

        Raises:
            MdpError: The model's loss is not finite.
        """
        key = f"{plan.hash} {how}"
        found = self._kept(key)
        if len(found) < self.frames:
            found = np.append(found, self._losses_of(build(), len(found)))
            self._check(plan, found)
        self._keep(key, found)
        return found - self._dense

    def change_of(self, model: nn.Module) -> np.ndarray:
        """Loss of a pruned model as it is, batch norms included, minus that of the dense model, (frames,)."""
        return self._losses_of(model, 0) - self._dense

    def _losses_of(self, model: nn.Module, first: int) -> np.ndarray:
        """Loss of the frames from ``first`` on, where a round begins."""
        model.eval()
        starts = np.cumsum([0, *map(len, self._batches)])
        return np.concatenate(
            [self._run(model, each) for each, at in zip(self._batches[: self.rounds], starts) if at >= first]
        )

    def measured(self, plan: PruningPlan) -> bool:
        """Whether `change` has nothing to do."""
        return len(self._kept(plan.hash)) >= self.frames

    def _kept(self, key: str) -> np.ndarray:
        known = max((kept.get(key, np.zeros(0)) for kept in (self._found, self._known)), key=len)
        return known[: self.frames]

    def _keep(self, key: str, losses: np.ndarray) -> None:
        self._found[key] = max(self._found.get(key, losses), losses, key=len)
        if len(self._known.get(key, ())) < len(losses):
            longer = {name: found for name, found in self._found.items() if len(found) > len(self._known.get(name, ()))}
            self._known = {**self._known, **longer}
            self._write()

    def _check(self, plan: PruningPlan, losses: np.ndarray) -> None:
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            parts = [*plan.removed, *(f"{name} at {cut.count}" for name, cut in plan.cuts.items())]
            raise MdpError(
                f"without {', '.join(parts[:3])}{' ...' if len(parts) > 3 else ''} the loss is {losses[bad[0]]} on "
                f"frame {bad[0]}: the model does not stand this cut; leave the part alone with prune.freeze. What was "
                "measured is kept"
            )

    def _forward(self, model: nn.Module, batch: Batch) -> float:
        return float(self.losses(model, batch))

    def _run(self, model: nn.Module, batches: list[Batch]) -> np.ndarray:
        """Loss per batch, the memory empty before the first."""
        _forget(model)
        found = []
        with torch.no_grad():
            for index, batch in enumerate(batches):
                with seeded(index):
                    found.append(self._forward(model, batch))
        _forget(model)
        return np.array(found)

    def _set_statistics(
        self, pruned: nn.Module, plan: PruningPlan, batches: list[Batch], reference: Statistics
    ) -> None:
        if self._ends_early and self._is_behind_norms(plan):
            norms = batch_norms(pruned)
            for name, (mean, variance) in reference.items():
                norms[name].running_mean.copy_(mean)
                norms[name].running_var.copy_(variance)
        else:
            self._reestimate(pruned, batches)

    def _reestimate(self, model: nn.Module, batches: list[Batch]) -> None:
        _forget(model)
        calls = [name for name in self._order if name in batch_norms(model)]
        if calls:
            reestimate_batch_norm(
                model,
                batches,
                lambda batch: self._forward(model, batch),
                calls=len(calls) if self._ends_early else None,
            )
        _forget(model)

    def _may_end_early(self, batches: list[Batch]) -> bool:
        """Whether no batch norm depends on a memory, which a forward pass that ends early does not write."""
        if not hasattr(self.model, "reset_memory") or not batch_norms(self.model):
            return True
        found = []
        for early in (False, True):
            self._ends_early = early
            model = copy.deepcopy(self.model)
            self._reestimate(model, batches)
            found.append(_statistics(model))
        return all(torch.equal(a, b) for n in found[0] for a, b in zip(found[0][n], found[1][n]))

    def _is_behind_norms(self, plan: PruningPlan) -> bool:
        """Whether everything that a plan touches runs after the last batch norm."""
        names = batch_norms(self.model)
        last = max((i for i, name in enumerate(self._order) if name in names), default=-1)
        first = {name: i for i, name in reversed(list(enumerate(self._order)))}
        touched = {m.tensor.rpartition(".")[0] for cut in plan.cuts.values() for m in cut.members} | set(plan.removed)
        return all(first.get(name, -1) > last for name in touched)

    def _read(self) -> dict[str, np.ndarray]:
        if not self.path.exists():
            return {}
        meta, arrays = read_npz(self.path, what="measured losses", schema_version=SCHEMA_VERSION)
        if {key: meta.get(key) for key in self.identity} != self.identity:
            return {}
        return {name: arrays[f"losses_{i}"] for i, name in enumerate(meta["plans"])}

    def _write(self) -> None:
        meta = {**self.identity, "plans": list(self._known)}
        write_npz(self.path, meta, {f"losses_{i}": array for i, array in enumerate(self._known.values())})


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Equal random numbers in the block each time; everyone else's go on behind it as if nothing had happened."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 - pipelines and samplers draw from it
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


def _rounds(pieces: Iterator[list[Batch]], round_frames: int, max_frames: int) -> Iterator[list[list[Batch]]]:
    taken, current = 0, []
    for piece in pieces:
        if taken + len(piece) > max_frames and taken:
            break
        current.append(piece)
        taken += len(piece)
        if sum(map(len, current)) >= round_frames:
            yield current
            current = []
    if current:
        yield current


def _call_order(model: nn.Module, forward: Callable[[], Any]) -> list[str]:
    """Paths of the modules in the order of their calls."""
    order: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, inputs: order.append(name)

    _forget(model)
    handles = [module.register_forward_pre_hook(note(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    _forget(model)
    return order


def _statistics(model: nn.Module) -> Statistics:
    return {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in batch_norms(model).items()}


def _forget(model: nn.Module) -> None:
    if hasattr(model, "reset_memory"):
        model.reset_memory()
