"""First-order Taylor importance (Molchanov et al., CVPR 2019, arXiv 1906.10771), accumulated on backward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn

from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.layers.gated import GatedEmbedding
from mdp_mmdet3d.space.types import OUTPUT, Dimension, PruningSpace, ScoreSource, TensorAxis


class TaylorAccumulator:
    """Adds up ``|sum of w * dL/dw|`` per element while gradients are computed.

    The product is taken the moment a parameter's gradient is complete, so that it does not matter who clears the
    gradients afterwards. Frozen parameters that are scored (the affine parameters of StreamPETR's batch norms) get a
    gradient for as long as the accumulator lives, but never keep it: an optimizer that holds them must not move them.
    Statistics and modes stay untouched.

    Use as a context manager; call `finish_batch` after the last backward of every batch, with gradients cleared in
    between. A batch may have several backwards whose gradients add up (gradient accumulation).

    Args:
        model: The dense model that ``space`` was traced from.
        space: Names what is scored.
        state: Sums to go on from: what `state` returned.
    """

    def __init__(self, model: nn.Module, space: PruningSpace, state: Mapping[str, np.ndarray] | None = None) -> None:
        self.space = space
        self.batches = int(state["batches"]) if state else 0
        self.skipped = int(state["skipped"]) if state else 0
        self._terms: dict[tuple[str, int], Tensor] = {}
        self._handles = []
        self._unfrozen: list[nn.Parameter] = []
        self._gated: list[GatedEmbedding] = []
        self._sources = [(d, s) for d in space.dimensions for s in d.sources]
        self._sums = [torch.zeros(d.copies, d.size, dtype=torch.float64) for d, _ in self._sources]
        if state:
            for i, total in enumerate(self._sums):
                total.copy_(torch.from_numpy(state[f"sum_{i}"]))
        self._lengths: dict[tuple[str, int], int] = {}
        self._device = next(model.parameters()).device
        axes: dict[str, set[int]] = defaultdict(set)
        for _, source in self._sources:
            for axis in source.axes:
                axes[axis.tensor].add(axis.axis)
        for name, wanted in axes.items():
            if name.endswith(OUTPUT):
                self._open_gates(name, model.get_submodule(name.removesuffix(OUTPUT)))
                continue
            parameter = model.get_parameter(name)
            frozen = not parameter.requires_grad
            if frozen:
                parameter.requires_grad_(True)
                self._unfrozen.append(parameter)
            self._lengths |= {(name, axis): parameter.shape[axis] for axis in sorted(wanted)}
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._reader(name, wanted, frozen)))

    def _open_gates(self, name: str, queries: GatedEmbedding) -> None:
        """Score queries by their gates, each weighted with what it scored."""
        gates = queries.open_gates()
        self._gated.append(queries)
        self._lengths[name, 0] = len(gates)

        def read(gates: Tensor) -> None:
            if gates.grad is None:
                return
            term = gates.grad.double() * (1.0 if queries.scores is None else queries.scores.double())
            self._terms[name, 0] = term + self._terms.get((name, 0), 0.0)
            gates.grad = None

        self._handles.append(gates.register_post_accumulate_grad_hook(read))

    def _reader(self, name: str, wanted: set[int], frozen: bool) -> Callable[[Tensor], None]:
        def read(parameter: Tensor) -> None:
            if parameter.grad is None:
                return
            product = parameter.detach().double() * parameter.grad.double()
            for axis in wanted:
                others = [i for i in range(product.ndim) if i != axis]
                term = product.sum(dim=others) if others else product
                # A trainable parameter's gradient already is the sum over all backwards of the batch.
                self._terms[name, axis] = term + self._terms.get((name, axis), 0.0) if frozen else term
            if frozen:
                parameter.grad = None

        return read

    def finish_batch(self, loss_scale: float = 1.0, reduce: Callable[[Tensor], Tensor] | None = None) -> bool:
        """Book the gradients of one batch.

        Args:
            loss_scale: Factor the loss was multiplied with (mixed precision).
            reduce: For a batch that is spread over processes: returns the mean over them of a float64 vector. Every
                process then books the same scores, those of the mean gradient.

        Returns:
            False if something was not finite; the batch is then skipped and counted.
        """
        terms, self._terms = self._terms, {}
        if reduce is not None:
            terms = self._reduced(terms, reduce)
        if not terms or not all(bool(torch.isfinite(t).all()) for t in terms.values()):
            self.skipped += 1
            return False
        for (dimension, source), total in zip(self._sources, self._sums):
            score = _score(dimension, source, terms)
            total += score.cpu() * (source.scale / loss_scale)
        self.batches += 1
        return True

    def _reduced(
        self, terms: Mapping[tuple[str, int], Tensor], reduce: Callable[[Tensor], Tensor]
    ) -> dict[tuple[str, int], Tensor]:
        """Means over the processes; a process without gradient of a tensor counts 0."""
        parts = [
            terms.get(key, torch.zeros(length, dtype=torch.float64, device=self._device))
            for key, length in self._lengths.items()
        ]
        means = reduce(torch.cat(parts)).split(list(self._lengths.values()))
        return dict(zip(self._lengths, means))

    def state(self) -> dict[str, np.ndarray]:
        """Everything needed to go on later."""
        sums = {f"sum_{i}": total.numpy().copy() for i, total in enumerate(self._sums)}
        return {"batches": np.array(self.batches), "skipped": np.array(self.skipped), **sums}

    def table(self, weights: str, frames: int | None = None, data: str = "") -> ImportanceTable:
        """Averages so far; see `ImportanceTable` for the arguments."""
        scores: dict[str, dict[str | None, np.ndarray]] = {d.name: {} for d in self.space.dimensions}
        for (dimension, source), total in zip(self._sources, self._sums):
            array = total.numpy() / max(self.batches, 1)
            blocks = scores[dimension.name]
            blocks[source.block] = blocks[source.block] + array if source.block in blocks else array.copy()
        seen = self.batches + self.skipped
        return ImportanceTable(
            self.space.model_digest,
            weights,
            self.batches,
            self.skipped,
            seen if frames is None else frames,
            scores,
            data,
        )

    def close(self) -> None:
        """Stop listening, freeze again what was frozen, and take the gates away."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._unfrozen:
            parameter.requires_grad_(False)
            parameter.grad = None
        for queries in self._gated:
            queries.gates = queries.scores = None

    def __enter__(self) -> TaylorAccumulator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _score(dimension: Dimension, source: ScoreSource, terms: Mapping[tuple[str, int], Tensor]) -> Tensor:
    """|sum over the source's tensors| per element, (copies, size); a tensor without gradient counts 0."""
    parts = [
        _region(dimension, axis, terms[axis.tensor, axis.axis])
        for axis in source.axes
        if (axis.tensor, axis.axis) in terms
    ]
    if not parts:
        return torch.zeros(dimension.copies, dimension.size, dtype=torch.float64)
    return torch.stack(parts).sum(dim=0).abs()


def _region(dimension: Dimension, axis: TensorAxis, values: Tensor) -> Tensor:
    copies = axis.copies_here(dimension.copies)
    length = len(copies) * dimension.size * axis.width
    found = values[axis.offset : axis.offset + length].reshape(len(copies), dimension.size, axis.width).sum(dim=2)
    # Copies that do not lie here score 0.
    return torch.nn.functional.pad(found, (0, 0, copies.start, dimension.copies - copies.stop))
