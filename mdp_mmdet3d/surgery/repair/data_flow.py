"""Which operators read what a module gave: followed through one forward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CallPath = tuple[tuple[str, int], ...]
"""Modules from the outermost call to this one, each with the number of its earlier calls by the same caller."""


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and dictionaries."""
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


class DataFlow(TorchDispatchMode):
    """Follows values, the contents of storages between two writes, through every operator that runs.

    Attributes:
        outputs: Values that each call returned.
        inputs: Values that each call was given.
        changes_inputs: Modules that write into something that was made outside of them.
        sums: For values that were added to another of the same shape, how many calls had ended by then.
        times: How many calls had ended before each call did.
        ended: How many calls have ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[CallPath, tuple[int, ...]] = {}
        self.inputs: dict[CallPath, tuple[int, ...]] = {}
        self.changes_inputs: set[str] = set()
        self.sums: dict[int, int] = {}
        self.times: dict[CallPath, float] = {}
        self.ended = 0
        self._readers: dict[int, set[CallPath]] = defaultdict(set)
        self._value_in: dict[int, int] = {}
        self._born_in: dict[int, CallPath] = {}
        self._values = 0
        self._path: CallPath = ()

    def enter(self, path: CallPath, arguments: Any) -> CallPath:
        """A call begins; returns its caller's path, to be handed to `leave`."""
        caller, self._path = self._path, path
        self.inputs[path] = tuple(self._value(tensor) for tensor in tensors_of(arguments))
        return caller

    def leave(self, caller: CallPath, output: Any) -> None:
        """The call that is running ends."""
        self.outputs[self._path] = tuple(self._value(tensor) for tensor in tensors_of(output))
        self.times[self._path] = self.ended
        self._path = caller
        self.ended += 1

    def is_read(self, path: CallPath, recorded: Container[CallPath]) -> bool:
        """Whether an operator outside of the calls in ``recorded`` reads what the call at ``path`` returned."""
        return path not in self.outputs or any(
            not any(reader[:depth] in recorded for depth in range(1, len(reader) + 1))
            for value in self.outputs[path]
            for reader in self._readers[value]
        )

    def readers(self, path: CallPath) -> set[str]:
        """Innermost modules of the operators that read what the call at ``path`` returned; "" for the caller."""
        found = {reader for value in self.outputs[path] for reader in self._readers[value] if reader != path}
        return {reader[-1][0] if reader else "" for reader in found}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        taken = list(tensors_of((args, kwargs)))
        for tensor in taken:
            self._readers[self._value(tensor)].add(self._path)
        if is_sum(func, args, kwargs):
            for tensor in args:
                self.sums.setdefault(self._value(tensor), self.ended)
        storages = {_storage(tensor) for tensor in taken}
        output = func(*args, **kwargs)
        for tensor in self._written(func, args, kwargs):
            self._note_write(_storage(tensor))
        for tensor in tensors_of(output):
            if _storage(tensor) not in storages:
                self._new_value(_storage(tensor), born=True)
        return output

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from tensors_of(args[i] if i < len(args) else kwargs.get(argument.name))

    def _note_write(self, storage: int) -> None:
        born = self._born_in.get(storage, ())
        for depth in range(1, len(self._path) + 1):
            if born[:depth] != self._path[:depth]:
                self.changes_inputs.add(self._path[depth - 1][0])
        self._new_value(storage)

    def _new_value(self, storage: int, born: bool = False) -> int:
        self._values += 1
        self._value_in[storage] = self._values
        if born:
            self._born_in[storage] = self._path
        return self._values

    def _value(self, tensor: Tensor) -> int:
        storage = _storage(tensor)
        return self._value_in.get(storage) or self._new_value(storage)


class SumWatch(TorchDispatchMode):
    """Sees the sums that outputs of watched modules enter.

    Args:
        on_sum: Called with the name under which an operand was announced, and the sum.
    """

    def __init__(self, on_sum: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._on_sum = on_sum
        self._waiting: dict[int, tuple[str, Tensor]] = {}

    def announce(self, name: str, operand: Tensor) -> None:
        """Wait for the sum that ``operand`` enters next."""
        self._waiting[_storage(operand)] = name, operand  # held, or another storage could get its number

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        entering = []
        if self._waiting and is_sum(func, args, kwargs or {}):
            entering = [self._waiting.pop(key)[0] for key in map(_storage, args) if key in self._waiting]
        output = func(*args, **(kwargs or {}))
        for name in entering:
            self._on_sum(name, output)
        return output


def is_sum(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator adds two tensors of one shape."""
    return (
        func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
        and kwargs.get("alpha", 1) == 1
        and len(args) == 2
        and all(isinstance(tensor, Tensor) for tensor in args)
        and args[0].shape == args[1].shape
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
