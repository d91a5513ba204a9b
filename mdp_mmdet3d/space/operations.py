"""What PyTorch computes in a forward pass: every function call with its arguments and the module it was made in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from mdp_mmdet3d.layers.evaluation import evaluating
from mdp_mmdet3d.layers.fused import without_fused_layers

Template = Any
"""Arguments of a call: tensors as ``{"input": shape}``, or ``{"weight": shape}`` where the model holds them; tensors
that hold no real numbers and other objects as ``{"other": type}``; else lists, numbers, text, booleans and None."""

# They move no data, or none that a runtime would not leave out: names of functions without their module.
_SHAPES = "view view_as reshape flatten unflatten squeeze unsqueeze permute transpose t swapaxes contiguous expand"
_PARTS = "expand_as chunk split tensor_split unbind getitem detach clone identity dropout dropout1d dropout2d dropout3d"
_FACTS = "shape dim size numel dtype device is_floating_point data all any item tolist requires_grad"
_OTHERS = (
    "to float double type type_as zeros_like ones_like empty_like new_zeros new_ones new_tensor new_full full_like"
)
VIEWS = frozenset(f"{_SHAPES} {_PARTS} {_FACTS} {_OTHERS}".split())


@dataclass(frozen=True)
class Operation:
    """One call of a PyTorch function that computes something.

    Attributes:
        module: Path of the innermost module that made it.
        function: Name under ``torch``, e.g. ``"torch.nn.functional.silu"``; empty for a module whose own operator
            PyTorch does not see.
        index: How many calls of this function the module made before.
        arguments: Positional arguments, a `Template`.
        keywords: Keyword arguments, a `Template` each.
        output: Shape of the first tensor that it returns.
        reads: Positions of the operations whose results it reads; None for what none of them made.
        view: Whether it only looks at its input otherwise (`VIEWS`), or returned it unchanged.
        constant: Whether it reads nothing but what the model holds, or what follows from it: export folds it.
    """

    module: str
    function: str
    index: int
    arguments: Template
    keywords: dict[str, Template]
    output: tuple[int, ...]
    reads: tuple[int | None, ...]
    view: bool
    constant: bool

    @property
    def key(self) -> tuple[str, str, int]:
        """The same in runs of the same model at other sizes or widths."""
        return self.module, self.function, self.index

    @property
    def name(self) -> str:
        """The function without its module, e.g. ``"silu"``."""
        return self.function.rpartition(".")[2].strip("_")


def record_operations(
    model: nn.Module, forward: Callable[[], Any], *, follow: bool = False
) -> tuple[list[Operation], dict[str, str]]:
    """Run ``forward`` once in evaluation mode without gradients and list what was computed, in order.

    Args:
        model: Whose modules are named; modes are as before afterwards.
        forward: Runs the model.
        follow: Keep results until the end, so that `Operation.reads`, constants and unchanged results are known. What
            ``forward`` feeds must have been made before.

    Returns:
        The operations; and leaf modules with parameters in which no function was called, with their classes.
    """
    held = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    recorder = _Recorder(follow, held)
    handles = []
    for name, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(recorder.enter(name)),
            module.register_forward_hook(recorder.leave(module), always_call=True),
        ]
    try:
        with evaluating(model), torch.no_grad(), without_fused_layers(), recorder:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return recorder.operations, recorder.opaque


def readers_of(operations: Sequence[Operation]) -> dict[int, list[int]]:
    """Positions of the operations that read the result of each, once each; `record_operations` with ``follow``."""
    readers: dict[int, list[int]] = {}
    for position, operation in enumerate(operations):
        for source in dict.fromkeys(operation.reads):
            if source is not None:
                readers.setdefault(source, []).append(position)
    return readers


class _Recorder(TorchFunctionMode):
    def __init__(self, follow: bool, held: set[int]) -> None:
        super().__init__()
        self.follow, self.held = follow, held
        self.operations: list[Operation] = []
        self.opaque: dict[str, str] = {}
        self._path: list[str] = [""]
        self._calls: list[int] = [0]
        self._counts: Counter[tuple[str, str]] = Counter()
        self._makers: dict[int, int] = {}
        self._kept: list[Tensor] = []  # so that no other tensor gets an identity

    def enter(self, name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            self._path.append(name)
            self._calls.append(len(self.operations))

        return note

    def leave(self, module: nn.Module) -> Callable[..., None]:
        leaf = next(module.children(), None) is None and next(module.parameters(), None) is not None

        def note(*_: Any) -> None:
            name, before = self._path.pop(), self._calls.pop()
            if leaf and before == len(self.operations):
                self.opaque[name] = type(module).__name__

        return note

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        result = found[0] if isinstance(found, tuple) and found else found
        if isinstance(result, Tensor):
            self._note(_function_name(func), args, kwargs or {}, found, result)
        return found

    def _note(self, function: str, args: Any, kwargs: dict[str, Any], found: Any, result: Tensor) -> None:
        tensors = list(tensors_in([args, kwargs]))
        module = self._path[-1]
        count = self._counts[module, function]
        self._counts[module, function] += 1
        name = function.rpartition(".")[2].strip("_")
        reads: tuple[int | None, ...] = ()
        constant = False
        view = name in VIEWS or not tensors
        if self.follow:
            self._kept += [*tensors, *tensors_in(found)]
            reads = tuple(self._makers.get(id(t)) for t in tensors)
            constants = [
                id(tensor) in self.held if maker is None else self.operations[maker].constant
                for tensor, maker in zip(tensors, reads)
            ]
            constant = all(constants)
            # A sum with a branch that is 0 only at initialisation is a sum.
            view = view or (all(constants[1:]) and _unchanged(tensors[0], result))
            for made in tensors_in(found):
                self._makers[id(made)] = len(self.operations)
        self.operations.append(
            Operation(
                module,
                function,
                count,
                self._template(list(args)),
                {key: self._template(value) for key, value in kwargs.items()},
                tuple(result.shape),
                reads,
                view,
                constant,
            )
        )

    def _template(self, value: Any) -> Template:
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                return {"other": str(value.dtype).removeprefix("torch.")}
            return {"weight" if id(value) in self.held else "input": list(value.shape)}
        if isinstance(value, (list, tuple)):
            return [self._template(part) for part in value]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        return {"other": type(value).__name__}


def _unchanged(before: Tensor, after: Tensor) -> bool:
    # Zeros tell nothing.
    return before is not after and before.shape == after.shape and bool(after.any()) and torch.equal(before, after)


def _function_name(func: Callable[..., Any]) -> str:
    name = resolve_name(func) or getattr(func, "__name__", repr(func))
    return str(name).removesuffix(".__get__")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors of arguments or results, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
