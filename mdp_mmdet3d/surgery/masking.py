"""The dense model with everything that a plan cuts switched off: what a pruned model must equal."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.layers.gated import GatedEmbedding
from mdp_mmdet3d.space.types import OUTPUT, Block, BlockKind
from mdp_mmdet3d.surgery.apply import check_fits, keep_masks, replace_block
from mdp_mmdet3d.surgery.plan import PruningPlan

# Last operators of the blocks in files that do not name them.
LAST_OF_VERSION_1 = ("bn3", "bn2", "attn.out_proj", "layers.1")


class MaskedLayerNorm(nn.Module):
    """LayerNorm whose statistics are those of the kept features only; the others give 0."""

    def __init__(self, norm: nn.LayerNorm, keep: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps  # None, None where it has none
        self.register_buffer("keep", keep, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same shape."""
        weight, bias = (None if part is None else part[self.keep] for part in (self.weight, self.bias))
        kept = nn.functional.layer_norm(x[..., self.keep], (int(self.keep.sum()),), weight, bias, self.eps)
        return torch.zeros_like(x).masked_scatter(self.keep.expand_as(x), kept)


def mask_model(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Switch off, in place, what ``plan`` cuts; tensors are replaced, not written, and keep their shapes.

    Cut queries are computed, but no other sees them, and what they predict is left out (`GatedEmbedding`).

    Args:
        model: The dense model the plan was made for.
        plan: What stays.

    Returns:
        The same object.

    Raises:
        StructureMismatchError: The model is not the one the plan was made for.
    """
    check_fits(model, plan)
    tensors = model.state_dict(keep_vars=True)
    owners = defaultdict(list)  # one tensor may have several
    for module in model.modules():
        for leaf, held in (*module._parameters.items(), *module._buffers.items()):
            owners[id(held)].append((module, leaf))
    with torch.no_grad():
        for name, masks in keep_masks(model, plan).items():
            if name.endswith(("running_mean", "running_var")):
                continue  # an output of 0 comes from gamma = beta = 0
            if name.endswith(OUTPUT):  # nothing reads a cut channel of a constant
                path = name.removesuffix(OUTPUT)
                if isinstance(norm := model.get_submodule(path), nn.LayerNorm):
                    _put(model, path, MaskedLayerNorm(norm, next(iter(masks.values()))))
                continue
            path = name.rpartition(".")[0]
            owner = model.get_submodule(path)
            if isinstance(owner, GatedEmbedding) and 0 in masks:
                owner.mask(masks.pop(0))
            tensor = tensors[name].detach().clone()
            for axis, mask in masks.items():
                tensor.index_fill_(axis, (~mask).nonzero().flatten().to(tensor.device), 0.0)
            for module, leaf in owners[id(tensors[name])]:
                _replace(module, leaf, tensor)
            if isinstance(owner, nn.LayerNorm):
                _put(model, path, MaskedLayerNorm(owner, masks[0].to(tensor.device)))
        for name, block in plan.removed.items():
            if block.kind is BlockKind.LAYER:
                replace_block(model, block)  # its post-norms have no neutral weights
            elif not any(name.startswith(f"{other}.") for other in plan.removed):
                silence_block(model, block)
    return model


def silence_block(model: nn.Module, block: Block) -> None:
    """Put an affine operator of zeros where the last one of a residual branch was.

    Raises:
        MdpError: The block names none that the model has.
    """
    module = model.get_submodule(block.name)
    for path in (block.last,) if block.last else LAST_OF_VERSION_1:
        try:
            last = module.get_submodule(path)
        except AttributeError:
            continue
        for leaf in ("weight", "bias"):
            if (old := getattr(last, leaf)) is not None:
                _replace(last, leaf, torch.zeros_like(old))
        return
    raise MdpError(
        f"{block.name}: the last operator of its branch is {block.last or 'not declared'!r}, which this "
        f"{type(module).__name__} does not have; declare it with SpaceBuilder.add_block(last=...)"
    )


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = module


def _replace(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Put ``tensor`` in the place of a parameter or buffer."""
    old = getattr(module, leaf)
    parameter = isinstance(old, nn.Parameter)
    setattr(module, leaf, nn.Parameter(tensor.detach(), requires_grad=old.requires_grad) if parameter else tensor)
