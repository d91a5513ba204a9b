"""Run the calibration frames of a model again and again, each time only from what is not settled yet.

Fitting layer after layer needs the inputs of every layer with all layers before it fitted. Whole forward passes would
cost the square of the depth; here a module whose layers are all fitted is run once more and from then on gives back its
recorded output, as long as anything still reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial, wraps
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mdp_mmdet3d.surgery.repair.data_flow import CallPath, DataFlow, SumWatch, tensors_of
from mdp_mmdet3d.surgery.repair.projections import PARTS, arguments_of, project
from mdp_mmdet3d.surgery.repair.torch_attention import attend, is_torch_attention

Frame = Callable[[nn.Module], Any]
"""Runs one batch of frames through a model, without labels; equal results for equal weights."""


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        path: Where it happened.
        name: Of the module.
        before: Module that the same caller called last, empty if none.
        index: How many calls with the same `before` and caller came before it.
    """

    path: CallPath
    name: str
    before: str
    index: int


@dataclass(frozen=True)
class Observed:
    """What a watched call took and gave.

    Attributes:
        call: The call.
        inputs: Its first tensor argument.
        output: Its result.
    """

    call: Call
    inputs: Tensor
    output: Any


class _StopFrame(BaseException):
    """Ends a frame behind the last call that is watched; no `Exception`, which a model might catch."""


@dataclass
class _Level:
    path: CallPath
    counts: dict[str, int] = field(default_factory=dict)
    pairs: dict[tuple[str, str], int] = field(default_factory=dict)
    last: str = ""


class _Stored:
    """An output: its tensors, or only their shapes once nothing reads them any more."""

    def __init__(self, leaves: list[Any], spec: Any) -> None:
        self.leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.spec = spec
        self.emptied = False

    @property
    def size(self) -> int:
        return 0 if self.emptied else sum(t.numel() * t.element_size() for t in tensors_of(self.leaves))

    def empty(self) -> None:
        """Keep the shapes alone. NaN makes a read that was not foreseen visible."""
        self.leaves = [_hollow(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        self.emptied = True

    def restore(self) -> Any:
        """The output; tensors are copies, which the model may change in place."""
        leaves = self.leaves
        if not self.emptied:
            leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(leaves, self.spec)


def _hollow(tensor: Tensor) -> Tensor:
    value = float("nan") if tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


class Replay:
    """Runs frames through one model; as a context manager it leaves the model as it was.

    Args:
        model: In evaluation mode.
        frames: By index.
        sites: Names of the modules that will be settled one by one.
        cache_bytes: Recorded outputs take at most this much; what does not fit is run again each time.
        attentions: Attentions whose packed projections are told as calls named ``attention.query`` and so on.
    """

    def __init__(
        self,
        model: nn.Module,
        frames: Mapping[int, Frame],
        sites: Collection[str] = (),
        cache_bytes: int = 0,
        attentions: Collection[str] = (),
    ) -> None:
        self.model, self.frames = model, frames
        self._cache_bytes, self._used_bytes = cache_bytes, 0
        self._sites, self._settled = set(sites), set[str]()
        self._attentions = set(attentions)
        self._clean = True  # nothing that may still change has run in this frame
        self._cache: dict[int, dict[CallPath, _Stored]] = {index: {} for index in frames}
        self._flow: DataFlow | None = None
        self._tracing: DataFlow | None = None
        self._stack: list[_Level] = []
        self._index = 0
        self._watched: Collection[str] | None = ()
        self._on_call: Callable[[Observed], None] | None = None
        self._left = 0
        self._sums: dict[str, str] = {}
        self._sum_watch: SumWatch | None = None
        self._patched: list[nn.Module] = []
        modules = dict(model.named_modules())
        names = {module: name for name, module in modules.items()}
        self._sites_in = {
            name: {names[inner] for inner in module.modules() if names[inner] in sites}
            for name, module in modules.items()
        }

    def __enter__(self) -> Replay:
        for name, module in self.model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule) and "forward" not in vars(module):
                forward = partial(attend, module) if is_torch_attention(module) else module.forward
                module.forward = self._wrapped(name, module, forward)
                self._patched.append(module)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for module in self._patched:
            del module.forward
        self._patched = []
        self._cache = {}

    def trace(self, index: int, on_call: Callable[[Observed], None]) -> DataFlow:
        """Run a frame whole, telling every call, and follow its tensors."""
        flow = DataFlow()
        self._tracing = flow
        try:
            with flow:
                self._run(index, None, on_call, -1)
        finally:
            self._tracing = None
        self._flow = flow
        return flow

    def run(
        self,
        index: int,
        names: Collection[str],
        on_call: Callable[[Observed], None],
        calls: int = -1,
        sums: Mapping[str, str] | None = None,
        on_sum: Callable[[str, Tensor], None] = lambda name, output: None,
    ) -> None:
        """Run a frame until ``names`` were called, and ``sums`` met, ``calls`` times, to its end if that never happens.

        Args:
            index: Of the frame.
            names: Modules to watch.
            on_call: Receives every call of them.
            calls: How many calls and sums there will be; -1: as many as there are.
            sums: By the name that ``on_sum`` receives, the module whose output enters a sum.
            on_sum: Receives the sums.
        """
        recorded = len(self._cache[index])
        if not sums:
            self._run(index, names, on_call, calls)
        else:

            def seen(name: str, output: Tensor) -> None:
                on_sum(name, output)
                self._count()

            self._sums, self._sum_watch = {module: name for name, module in sums.items()}, SumWatch(seen)
            try:
                with self._sum_watch:
                    self._run(index, names, on_call, calls)
            finally:
                self._sum_watch = None
        if len(self._cache[index]) != recorded:
            self._forget(index)

    def settle(self, name: str) -> None:
        """The weights of site ``name`` will not change any more."""
        self._settled.add(name)

    def _run(self, index: int, names: Collection[str] | None, on_call: Callable[[Observed], None], calls: int) -> None:
        self._index, self._watched, self._on_call, self._left = index, names, on_call, calls
        self._stack, self._clean = [_Level(())], True
        try:
            with torch.no_grad():
                self.frames[index](self.model)
        except _StopFrame:
            pass
        finally:
            self._on_call = None
            self._stack = []

    def _wrapped(self, name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._stack:
                return forward(*args, **kwargs)
            level = self._stack[-1]
            count = level.counts[name] = level.counts.get(name, -1) + 1
            before = level.last
            index = level.pairs[before, name] = level.pairs.get((before, name), -1) + 1
            path = (*level.path, (name, count))
            if name in self._attentions:
                self._tell_projections(path, name, module, args, kwargs, before, index)
            stored = self._cache[self._index].get(path)
            if stored is not None:
                output = stored.restore()
            else:
                self._stack.append(_Level(path))
                inside = self._tracing.enter(path, (args, kwargs)) if self._tracing else None
                output = forward(*args, **kwargs)
                self._stack.pop()
                if inside is not None and self._tracing:
                    self._tracing.leave(inside, output)
                self._clean &= name not in self._sites or name in self._settled
                if self._clean and self._sites_in[name] <= self._settled:
                    self._record(path, name, output)
            level.last = name
            if self._on_call is not None and (self._watched is None or name in self._watched):
                inputs = next(tensors_of((args, kwargs)), None)
                if inputs is not None:
                    self._on_call(Observed(Call(path, name, before, index), inputs, output))
                self._count()
            if self._sum_watch is not None and name in self._sums and isinstance(output, Tensor):
                self._sum_watch.announce(self._sums[name], output)
            return output

        return call

    def _tell_projections(
        self, path: CallPath, name: str, module: nn.Module, args: Any, kwargs: Any, before: str, index: int
    ) -> None:
        for part, x in arguments_of(args, kwargs):
            virtual = f"{name}.{PARTS[part]}"
            if self._on_call is None or (self._watched is not None and virtual not in self._watched):
                continue
            inside = (*path, (virtual, 0))
            if self._tracing is not None:  # shapes are enough, and operators of ours must not count as the model's
                self._tracing.times[inside] = self._tracing.ended - 0.25
            output = x if self._tracing is not None else project(module, part, x)
            self._on_call(Observed(Call(inside, virtual, before, index), x, output))
            self._count()

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise _StopFrame

    def _record(self, path: CallPath, name: str, output: Any) -> None:
        if self._flow is None or name in self._flow.changes_inputs:
            return
        leaves, spec = pytree.tree_flatten(output)
        if not all(leaf is None or isinstance(leaf, (Tensor, int, float, str, bool)) for leaf in leaves):
            return
        size = sum(t.numel() * t.element_size() for t in tensors_of(leaves))
        if self._used_bytes + size <= self._cache_bytes:
            self._cache[self._index][path] = _Stored(leaves, spec)
            self._used_bytes += size

    def _forget(self, index: int) -> None:
        """Drop recorded outputs that are inside of others or that only recorded calls would read."""
        cache = self._cache[index]
        for path in list(cache):
            if any(path[:depth] in cache for depth in range(1, len(path))):
                self._used_bytes -= cache.pop(path).size
        for path, stored in cache.items():
            if not stored.emptied and self._flow is not None and not self._flow.is_read(path, cache):
                self._used_bytes -= stored.size
                stored.empty()
