"""What every kind of operator answers, and the signature that names one operator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Attribute = int | float | str | bool

SOURCE_CHANNELS = 16  # channels of the input from which a probe makes the operator's input in the runtime's layout
DECODER_COPIES = 2  # sub-layers in a row: a sub-layer alone costs less than within a decoder


@dataclass(frozen=True)
class Work:
    """One execution of an operator.

    Attributes:
        macs: Multiply-accumulate operations in matrix products and convolutions.
        elements: Numbers read and written: inputs, weights and outputs of each kernel once.
        kernels: Kernels that run after the usual fusions.
    """

    macs: float
    elements: float
    kernels: int


class GraphBuilder(Protocol):
    """Collects the nodes of a probe (`mdp_mmdet3d.latency.graphs`); tensors are named by their part.

    Every method that adds a node returns the name of its output.
    """

    def input(self, name: str, *shape: int) -> str:
        """Add a graph input."""

    def node(self, operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        """Add a node."""

    def constant(self, name: str, value: np.ndarray, *, keep_type: bool = False) -> str:
        """Add a constant, in the probe's precision unless ``keep_type``."""

    def conv(
        self,
        x: str,
        output: str,
        ci: int,
        co: int,
        *,
        kernel: tuple[int, int] = (1, 1),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> str:
        """Add a convolution (B, ci, H, W) to (B, co, H', W') with random weights; pairs are (height, width)."""

    def linear(self, x: str, output: str, fan_in: int, fan_out: int) -> str:
        """Add a linear layer (..., fan_in) to (..., fan_out) with random weights."""

    def layer_norm(self, x: str, output: str, size: int) -> str:
        """Add a normalisation over the last axis, which has ``size`` entries."""

    def reshape(self, x: str, output: str, *shape: int) -> str:
        """Add a reshape."""

    def pool_sink(self, x: str, output: str = "sink") -> None:
        """End in a global average of a map (B, C, H, W)."""

    def token_sink(self, x: str) -> None:
        """End in the first token of (B, T, C)."""


class OperatorKind(ABC):
    """Everything the line knows about one kind of operator.

    Attributes:
        name: Unique name, the first part of every signature's key.
        roles: What the counts are that its latency depends on, in the order of `CostTerm.widths`.
        attributes: Names that every signature has: shapes, strides, what it is fused with.
        optional: Names that a signature has only where the value is not the usual one (`canonical`).
        samples: How many widths of a role a latency table holds; None means all of them.
        whole_roles: Roles that count whole matrices: hardware does not pad them to tiles.
    """

    name: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]
    attributes: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    samples: ClassVar[Mapping[str, int | None]] = {}
    whole_roles: ClassVar[frozenset[str]] = frozenset()

    def samples_of(self, role: str) -> int | None:
        """How many widths of ``role`` are sampled; None means all of them."""
        return self.samples.get(role, 3)

    def canonical(self, attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
        """The attributes without optional ones that have their usual value; one operator has one key."""
        return dict(attributes)

    def deployed_widths(self, signature: OperatorSignature, widths: tuple[int, ...], precision: str) -> tuple[int, ...]:
        """Widths that a deployment in ``precision`` has where a plan has ``widths``."""
        return widths

    @abstractmethod
    def work(self, signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
        """How much it computes and moves at ``widths``."""

    @abstractmethod
    def graph(self, build: GraphBuilder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
        """Write the probe into ``build``; returns how often the operator runs in it.

        Raises:
            ValueError: An attribute has a value that cannot be built.
        """

    @abstractmethod
    def torch_call(
        self, signature: OperatorSignature, widths: tuple[int, ...]
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """A callable that runs the operator in PyTorch and the tensors it takes, on the CPU in float32."""


# Kinds by name; filled by `mdp_mmdet3d.operators`.
OPERATORS: dict[str, OperatorKind] = {}


@dataclass(frozen=True)
class OperatorSignature:
    """A kind of operator and everything that fixes its latency, but for the widths.

    Attributes:
        kind: One of `OPERATORS`.
        attributes: Sorted (name, value) pairs, e.g. ``(("batch", 6), ("height", 64), ...)``.
    """

    kind: str
    attributes: tuple[tuple[str, Attribute], ...]

    @classmethod
    def make(cls, kind: str, **attributes: Attribute) -> OperatorSignature:
        """Build a signature with sorted attributes.

        Raises:
            ValueError: The kind is unknown, or an attribute is missing or not one of this kind.
        """
        if kind not in OPERATORS:
            raise ValueError(f"unknown operator kind {kind!r}; known: {', '.join(OPERATORS)}")
        operator = OPERATORS[kind]
        missing = [name for name in operator.attributes if name not in attributes]
        unknown = [name for name in attributes if name not in (*operator.attributes, *operator.optional)]
        if missing or unknown:
            raise ValueError(
                f"operator {kind!r}: attributes {missing} are missing, {unknown} are unknown; it has "
                f"{', '.join((*operator.attributes, *operator.optional))}"
            )
        return cls(kind, tuple(sorted(operator.canonical(attributes).items())))

    def __getitem__(self, name: str) -> Any:
        return dict(self.attributes)[name]

    def get(self, name: str, default: Attribute) -> Any:
        """Value of an optional attribute."""
        return dict(self.attributes).get(name, default)

    @property
    def key(self) -> str:
        """Readable unique key, e.g. ``"conv/batch=6/height=64/..."``."""
        return "/".join([self.kind, *(f"{name}={value}" for name, value in self.attributes)])


def matrix_work(rows: int, fan_in: int, fan_out: int, copies: int = 1) -> Work:
    """Work of ``copies`` products (rows, fan_in) x (fan_in, fan_out)."""
    elements = copies * (rows * fan_in + fan_in * fan_out + rows * fan_out)
    return Work(copies * rows * fan_in * fan_out, elements, 1)
