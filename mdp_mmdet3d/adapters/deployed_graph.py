"""One graph of a model as it is deployed, and what is seen by running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from mdp_mmdet3d.adapters.network import Shapes, record_input_shapes
from mdp_mmdet3d.space.calls import Call, record_calls
from mdp_mmdet3d.space.operations import Operation, record_operations

Run = Callable[[nn.Module], Any]


def whole(model: nn.Module) -> nn.Module:
    """The model itself."""
    return model


@dataclass(frozen=True)
class AtSize:
    """A run at the deployed size.

    Attributes:
        shapes: `record_input_shapes`.
        operations: `record_operations`, without what reads what.
    """

    shapes: Shapes
    operations: list[Operation]


@dataclass(frozen=True)
class DeployedGraph:
    """A graph that a runtime is given.

    What the runs feed must have been made before: what they make themselves out of nothing counts as constant, which
    export folds.

    Attributes:
        engine: Its name.
        small: Runs the part on a small input, also that of a model with other widths.
        deployed: Runs the part at the deployed size.
        part: What of a model is deployed, with its modules under the model's names.
    """

    engine: str
    small: Run
    deployed: Run
    part: Callable[[nn.Module], nn.Module] = whole

    def calls(self, model: nn.Module) -> list[Call]:
        """Calls of the part's modules, small."""
        part = self.part(model)
        names = dict(part.named_modules())
        return [call for call in record_calls(part, partial(self.small, part)) if call.name in names]

    def operations(self, model: nn.Module) -> tuple[list[Operation], dict[str, str]]:
        """`record_operations` of the part, small, with what reads what."""
        part = self.part(model)
        return record_operations(part, partial(self.small, part), follow=True)

    def at_size(self, model: nn.Module) -> AtSize:
        """One run at the deployed size."""
        part = self.part(model)
        operations: list[Operation] = []

        def run() -> None:
            operations.extend(record_operations(part, partial(self.deployed, part))[0])

        return AtSize(record_input_shapes(part, run), operations)
