"""Query, key and value projections that an attention packs into one tensor: linear maps that are no modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mdp_mmdet3d.surgery.repair.layers import LinearLayer, add_to
from mdp_mmdet3d.surgery.repair.torch_attention import is_torch_attention

PARTS = ("query", "key", "value")


@dataclass
class ProjectionLayer(LinearLayer):
    """One projection of an attention: with head widths as attributes, or ``torch.nn.MultiheadAttention``.

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
        return 1, *self.weight.shape[::-1]

    @property
    def has_constant(self) -> bool:
        """See `Layer.has_constant`."""
        return self.module.in_proj_bias is not None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `Layer.tensors`."""
        names = (self.kept, "in_proj_bias") if self.has_constant else (self.kept,)
        return {f"{self.attention}.{name}": getattr(self.module, name).data for name in names}

    @property
    def kept(self) -> str:
        """See `Layer.kept`."""
        return weight_name(self.module, self.part)

    @property
    def weight(self) -> Tensor:
        """(rows, C) of this projection, not a copy."""
        return weight_of(self.module, self.part)

    def kept_rows(self, mask: Tensor) -> Tensor:
        """Mask of this projection, of the dense model, from that over the rows of its tensor `kept`."""
        return mask[rows_of(self.module, self.part)] if self.kept == PACKED else mask

    def run(self, x: Tensor) -> Tensor:
        """See `Layer.run`."""
        return project(self.module, self.part, x)

    def change(self, weight: Tensor, constant: Tensor) -> None:
        """See `Layer.change`."""
        add_to(self.weight, weight[0])
        if self.has_constant:
            add_to(self.module.in_proj_bias[rows_of(self.module, self.part)], constant[0])


PACKED = "in_proj_weight"


def projections_of(name: str, module: nn.Module) -> list[ProjectionLayer]:
    """The three of an attention whose structure is understood; none of another module."""
    layers = [ProjectionLayer(f"{name}.{part}", module, part=i) for i, part in enumerate(PARTS)]
    if is_torch_attention(module):
        return layers
    known = all(hasattr(module, each) for each in (PACKED, "num_heads", "qk_head_dim", "v_head_dim"))
    if not known or module.in_proj_weight is None:
        return []
    if rows_of(module, len(PARTS) - 1).stop != len(module.in_proj_weight):
        return []
    return layers


def rows_of(module: nn.Module, part: int) -> slice:
    """Rows of a projection in what is packed, ``in_proj_bias`` in any case."""
    if is_torch_attention(module):
        return slice(part * module.embed_dim, (part + 1) * module.embed_dim)
    ends = [0]
    for width in (module.qk_head_dim, module.qk_head_dim, module.v_head_dim):
        ends.append(ends[-1] + module.num_heads * width)
    return slice(ends[part], ends[part + 1])


def weight_name(module: nn.Module, part: int) -> str:
    """Tensor that holds a projection's weights; torch keeps them apart where keys or values have other widths."""
    return PACKED if module.in_proj_weight is not None else f"{PARTS[part][0]}_proj_weight"


def weight_of(module: nn.Module, part: int) -> Tensor:
    """(rows, C) of a projection, not a copy."""
    weight = getattr(module, weight_name(module, part))
    return weight[rows_of(module, part)] if module.in_proj_weight is not None else weight


def project(module: nn.Module, part: int, x: Tensor) -> Tensor:
    """What an attention makes of one argument: (..., C) to (..., rows)."""
    bias = module.in_proj_bias
    return F.linear(x, weight_of(module, part), None if bias is None else bias[rows_of(module, part)])


def arguments_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[int, Tensor]]:
    """Query, key and value of a call, as far as they are tensors; one that is left out is not guessed."""
    for i, part in enumerate(PARTS):
        value = args[i] if i < len(args) else kwargs.get(part)
        if isinstance(value, Tensor):
            yield i, value
