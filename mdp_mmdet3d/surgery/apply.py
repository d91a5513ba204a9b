"""Cut a plan out of a dense model: slice tensors, replace blocks."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mdp_mmdet3d.errors import StructureMismatchError
from mdp_mmdet3d.files import digest
from mdp_mmdet3d.layers import RemovedBranch, RemovedSubLayer, TorchAttention, widened
from mdp_mmdet3d.layers.attention import is_deformable, separate_projections
from mdp_mmdet3d.layers.kept import keep_output
from mdp_mmdet3d.layers.packed_attention import QKV
from mdp_mmdet3d.space.types import OUTPUT, Block, BlockKind, DimensionKind
from mdp_mmdet3d.surgery.plan import PruningPlan

# Attributes of the owning module that hold the count, for dimensions that are not visible in a tensor's shape alone.
COUNT_ATTRIBUTES = {
    DimensionKind.HEADS: ("num_heads",),
    DimensionKind.QK_WIDTH: ("qk_head_dim",),
    DimensionKind.V_WIDTH: ("v_head_dim",),
    DimensionKind.HEAD_WIDTH: ("qk_head_dim", "v_head_dim"),
}


class ShortcutBlock(nn.Module):
    """What remains of a residual block whose residual branch is removed, e.g. activation(shortcut(x)).

    Args:
        stays: Children of the block by name, in the order in which they are applied.
    """

    def __init__(self, stays: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in stays.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        for module in self.children():
            x = module(x)
        return x


def model_digest(model: nn.Module) -> str:
    """Digest of a model's state-dict names and shapes."""
    return digest({name: list(tensor.shape) for name, tensor in model.state_dict().items()})


def apply_plan(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Cut ``plan`` out of ``model``, in place, before an optimizer, DDP or EMA holds its parameters.

    Works with and without trained weights: selected elements keep their values and their order.

    Args:
        model: The dense model that the plan was made for.
        plan: What stays.

    Returns:
        The same object, now pruned.

    Raises:
        StructureMismatchError: The model is not the one the plan was made for; it is left unchanged.
    """
    check_fits(model, plan)
    counted = {name: cut for name, cut in plan.cuts.items() if cut.kind in COUNT_ATTRIBUTES}
    for path in dict.fromkeys([*(name.rpartition(".")[0] for name in counted), *_embedded_attentions(model, plan)]):
        _allow_unequal_widths(model, path)
    with torch.no_grad():
        for name, masks in keep_masks(model, plan).items():
            if name.endswith(OUTPUT):
                for axis, mask in masks.items():
                    keep_output(model.get_submodule(name.removesuffix(OUTPUT)), axis, mask.nonzero().flatten())
            else:
                _slice(model, name, masks)
    for name, cut in counted.items():
        for attribute in COUNT_ATTRIBUTES[cut.kind]:
            setattr(model.get_submodule(name.rpartition(".")[0]), attribute, cut.count)
    # Removed blocks leave their own cuts behind, so a removed parent makes its children's replacement a no-op.
    for name, removed in plan.removed.items():
        if not any(name.startswith(f"{other}.") for other in plan.removed):
            replace_block(model, removed)
    return model


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy whose modules are its own and whose tensors are the model's; `apply_plan` writes none of them."""
    held: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, held)


def _allow_unequal_widths(model: nn.Module, path: str) -> None:
    """Replace a dense attention whose class has one width for q, k and v."""
    found = model.get_submodule(path)
    if not hasattr(found, COUNT_ATTRIBUTES[DimensionKind.QK_WIDTH][0]) and not is_deformable(found):
        parent, _, leaf = path.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = widened(found)


def _embedded_attentions(model: nn.Module, plan: PruningPlan) -> list[str]:
    """Attentions whose stream is cut: their classes take the width of a head to be a share of it."""
    found: dict[str, None] = {}
    for cut in plan.cuts.values():
        for member in cut.members if cut.kind is DimensionKind.EMBED_WIDTH else ():
            path = member.tensor.rpartition(".")[0]
            for candidate in (path, path.rpartition(".")[0]):
                module = model.get_submodule(candidate)
                packed = isinstance(getattr(module, QKV, None), nn.Linear)
                if isinstance(module, nn.MultiheadAttention) or packed or separate_projections(module) is not None:
                    found[candidate] = None
    return list(found)


def with_queries_of(model: nn.Module, plan: PruningPlan) -> tuple[nn.Module, PruningPlan]:
    """The dense model with as many learned queries as ``plan`` leaves, and the rest of the plan.

    Both are what they were where the plan cuts no queries; else the model is a copy that shares tensors.
    """
    queries = {name: cut for name, cut in plan.cuts.items() if cut.kind is DimensionKind.QUERIES}
    if not queries:
        return model, plan
    fewer = apply_plan(shared_copy(model), replace(plan, cuts=queries, removed={}))
    rest = {name: cut for name, cut in plan.cuts.items() if name not in queries}
    return fewer, replace(plan, model_digest=model_digest(fewer), cuts=rest)


def check_fits(model: nn.Module, plan: PruningPlan) -> None:
    """Raise `StructureMismatchError` unless ``plan`` was made for a model with these names and shapes."""
    if model_digest(model) == plan.model_digest:
        return
    tensors = dict(model.state_dict(keep_vars=True))
    for name, cut in plan.cuts.items():
        for member in (m for m in cut.members if not m.tensor.endswith(OUTPUT)):
            needed = member.offset + cut.size * len(member.copies_here(len(cut.kept))) * member.width
            if member.tensor not in tensors:
                raise StructureMismatchError(
                    f"the plan was made for another model: it cuts {name!r} in {member.tensor!r}, "
                    "which this model does not have"
                )
            found = tuple(tensors[member.tensor].shape)
            if member.axis >= len(found) or found[member.axis] < needed:
                raise StructureMismatchError(
                    f"the plan was made for another model: {member.tensor!r} has shape {found}, the plan expects at "
                    f"least {needed} along axis {member.axis}"
                )
    raise StructureMismatchError(
        f"the plan was made for a model with digest {plan.model_digest}, this one has {model_digest(model)} "
        "(state-dict names or shapes differ); use the dense config the plan was made with"
    )


def keep_masks(model: nn.Module, plan: PruningPlan) -> dict[str, dict[int, Tensor]]:
    """Boolean keep mask per tensor and axis; dimensions that share an axis are combined by AND."""
    tensors = model.state_dict(keep_vars=True)
    masks: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for cut in plan.cuts.values():
        for member in cut.members:
            length = member.offset + cut.size * len(member.copies_here(len(cut.kept))) * member.width
            if not member.tensor.endswith(OUTPUT):
                length = tensors[member.tensor].shape[member.axis]
            mask = masks[member.tensor].setdefault(member.axis, torch.ones(length, dtype=torch.bool))
            copies = member.copies_here(len(cut.kept))
            region = torch.zeros(len(copies) * cut.size, dtype=torch.bool)
            region[[place * cut.size + e for place, copy in enumerate(copies) for e in cut.kept[copy]]] = True
            start = member.offset
            mask[start : start + region.numel() * member.width] &= region.repeat_interleave(member.width)
    return dict(masks)


def _slice(model: nn.Module, name: str, masks: dict[int, Tensor]) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    old = getattr(owner, leaf)
    new = old.detach()
    for axis, mask in masks.items():
        new = new.index_select(axis, mask.nonzero().flatten().to(new.device))
    if isinstance(old, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(new.contiguous(), requires_grad=old.requires_grad))
    else:
        setattr(owner, leaf, new.contiguous())
    sync_attributes(owner)


def sync_attributes(module: nn.Module) -> None:
    """Make a module's size attributes agree with its tensors."""
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:  # whole groups go
            module.groups = module.groups * module.weight.shape[0] // module.out_channels
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.ConvTranspose2d):
        module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = module.running_mean.shape[0] if module.running_mean is not None else len(module.weight)
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * module.weight.shape[0] // module.num_channels  # whole groups go
        module.num_channels = module.weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape


def replace_block(model: nn.Module, block: Block) -> None:
    """Replace one block by what remains of it; names of everything else stay.

    Raises:
        StructureMismatchError: The block has no such child as one that is to stay.
    """
    path, _, leaf = block.name.rpartition(".")
    replacement: nn.Module = nn.Identity()
    if block.kind is BlockKind.BRANCH:
        old = model.get_submodule(block.name)
        replacement = RemovedBranch(weights=isinstance(old, (nn.MultiheadAttention, TorchAttention)))
    elif block.kind is BlockKind.SUB_LAYER:
        replacement = RemovedSubLayer()
    elif block.kind is BlockKind.RESIDUAL_BRANCH:
        children = dict(model.get_submodule(block.name).named_children())
        missing = [name for name in block.stays if name not in children]
        if missing:
            raise StructureMismatchError(
                f"{block.name}: {missing[0]!r} is to stay when the residual branch goes, but the block's children are "
                f"{', '.join(children)}"
            )
        replacement = ShortcutBlock({name: children[name] for name in block.stays})
    model.get_submodule(path)._modules[leaf] = replacement
