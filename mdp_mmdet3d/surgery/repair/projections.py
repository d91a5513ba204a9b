"""Query, key and value projections that an attention packs into one tensor: linear maps that are no modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mdp_mmdet3d.surgery.repair.layers import LinearLayer, add_to

PARTS = ("query", "key", "value")


@dataclass
class ProjectionLayer(LinearLayer):
    """One projection of an attention with ``in_proj_weight`` and head widths as attributes.

    Attributes:
        part: Index in `PARTS`; also that of the attention's argument.
    """

    part: int = 0

    @property
    def attention(self) -> str:
        """Path of the attention."""
        return self.name.rpartition(".")[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Layer.shape`."""
        rows = rows_of(self.module, self.part)
        return 1, self.module.in_proj_weight.shape[1], rows.stop - rows.start

    @property
    def has_constant(self) -> bool:
        """See `Layer.has_constant`."""
        return self.module.in_proj_bias is not None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `Layer.tensors`."""
        names = ("in_proj_weight", "in_proj_bias") if self.has_constant else ("in_proj_weight",)
        return {f"{self.attention}.{name}": getattr(self.module, name).data for name in names}

    @property
    def kept(self) -> str:
        """See `Layer.kept`."""
        return "in_proj_weight"

    def run(self, x: Tensor) -> Tensor:
        """See `Layer.run`."""
        return project(self.module, self.part, x)

    def change(self, weight: Tensor, constant: Tensor) -> None:
        """See `Layer.change`."""
        rows = rows_of(self.module, self.part)
        add_to(self.module.in_proj_weight[rows], weight[0])
        if self.has_constant:
            add_to(self.module.in_proj_bias[rows], constant[0])


def projections_of(name: str, module: nn.Module) -> list[ProjectionLayer]:
    """The three of an attention whose structure is understood; none of another module."""
    known = all(hasattr(module, each) for each in ("in_proj_weight", "num_heads", "qk_head_dim", "v_head_dim"))
    if not known or module.in_proj_weight is None:
        return []
    if rows_of(module, len(PARTS) - 1).stop != len(module.in_proj_weight):
        return []
    return [ProjectionLayer(f"{name}.{part}", module, part=i) for i, part in enumerate(PARTS)]


def rows_of(module: nn.Module, part: int) -> slice:
    """Rows of ``in_proj_weight``."""
    ends = [0]
    for width in (module.qk_head_dim, module.qk_head_dim, module.v_head_dim):
        ends.append(ends[-1] + module.num_heads * width)
    return slice(ends[part], ends[part + 1])


def project(module: nn.Module, part: int, x: Tensor) -> Tensor:
    """What an attention makes of one argument: (..., C) to (..., rows)."""
    rows = rows_of(module, part)
    bias = module.in_proj_bias
    return F.linear(x, module.in_proj_weight[rows], None if bias is None else bias[rows])


def arguments_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[int, Tensor]]:
    """Query, key and value of a call, as far as they are tensors; one that is left out is not guessed."""
    for i, part in enumerate(PARTS):
        value = args[i] if i < len(args) else kwargs.get(part)
        if isinstance(value, Tensor):
            yield i, value
