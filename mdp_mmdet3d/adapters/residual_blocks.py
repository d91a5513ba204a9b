"""Residual blocks of a convolutional network, found by what they do and not by their class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.calls import Call
from mdp_mmdet3d.space.conv import is_scale
from mdp_mmdet3d.space.types import Block, BlockKind
from mdp_mmdet3d.surgery.apply import ShortcutBlock, shared_copy
from mdp_mmdet3d.surgery.masking import silence_block

SHORTCUT, ACTIVATION = "downsample", "relu"  # of ResNets of mmdet, mmpretrain, torchvision; the behaviour is checked
GATE = 3  # layers with weights of a gate, and the last one of the branch in front of it
TOLERANCE = 1e-5  # relative; float32 sums in the same order


@dataclass(frozen=True)
class ResidualBlock:
    """A block that computes ``activation(shortcut(x) + branch(x))``.

    Attributes:
        name: Path.
        kind: What remains when the branch goes.
        silent: Path within it of the last operator with weights of the branch; at zero, the branch is.
        conv: Path of the last convolution (or linear layer) of the branch, with which a runtime fuses the addition;
            empty where a gate stands between.
    """

    name: str
    kind: BlockKind
    silent: str
    conv: str


def find_residual_blocks(calls: Sequence[Call], blocks: Sequence[str] = ()) -> tuple[list[ResidualBlock], list[str]]:
    """Blocks whose branch can go, and modules that look like one but do something else without it.

    A module is taken for a block if it holds convolutions (or linear layers, on maps) and, with the last operator of
    its branch at zero, returns its input (an identity block behind a ReLU) or the activation of its shortcut: on an
    input of the recorded shape, up to rounding.

    Args:
        calls: `record_calls` of the dense model.
        blocks: Paths that are blocks already.

    Returns:
        The blocks, and paths of modules with a shortcut or an addition that are not understood.
    """
    found: list[ResidualBlock] = []
    doubtful: list[str] = []
    seen = set(blocks)
    for call in calls:
        if call.leaf or call.name in seen or call.input.ndim != 4:
            continue
        inside = [c for c in calls if call.first < c.first and c.last < call.last]
        shortcut = getattr(call.module, SHORTCUT, None)
        prefix = f"{call.name}.{SHORTCUT}"
        convs = [
            c
            for c in inside
            if isinstance(c.module, (nn.Conv2d, nn.Linear)) and c.name != prefix and not c.name.startswith(f"{prefix}.")
        ]
        if len(convs) < 2 or any(isinstance(m, (nn.ModuleList, nn.Sequential)) for m in (call.module,)):
            continue
        own = [c for c in inside if c.leaf and next(c.module.parameters(), None) is not None]
        own = [c for c in own if c.name != prefix and not c.name.startswith(f"{prefix}.")]
        behind = [c for c in own if c.first >= convs[-1].first]
        closing = behind[-1:]
        if any(
            "sigmoid" in type(c.module).__name__.lower() for c in inside
        ):  # a gate behind the branch is no end of it
            closing += [c for c in reversed(own) if c is not behind[-1]][:GATE]
        for last in closing:
            silent = last.name[len(call.name) + 1 :]
            kind = _kind(call, shortcut, silent)
            if kind is not None:
                # A runtime fuses the addition with a convolution that it directly follows.
                conv = convs[-1].name if last is behind[-1] else ""
                found.append(ResidualBlock(call.name, kind, silent, conv))
                seen.add(call.name)
                break
        if call.name in seen:
            continue
        if isinstance(shortcut, nn.Module):
            doubtful.append(call.name)
    return found, doubtful


def add_residual_branches(builder: SpaceBuilder, calls: Sequence[Call]) -> list[ResidualBlock]:
    """Add every residual block as removable; what is not understood is left alone with its reason."""
    found, doubtful = find_residual_blocks(calls)
    for block in found:
        reason = builder.excluded(block.name)
        if reason is not None:
            builder.left_alone.setdefault(block.name, reason)
        else:
            builder.add_block(block.name, block.kind, last=block.silent, stays=(SHORTCUT, ACTIVATION))
    for name in doubtful:
        builder.leave(name, "it has a shortcut, but without its branch it does not return the shortcut's activation")
    return found


def _kind(call: Call, shortcut: nn.Module | None, last: str) -> BlockKind | None:
    """How the block behaves without its branch, None if not as a residual block."""
    silent = shared_copy(call.module)
    with torch.no_grad():
        _open_scales(silent)
        # The recorded input may be 0, or have been overwritten in place; only behind a ReLU nothing is below 0.
        draw = torch.randn if bool((call.input < 0).any()) else torch.rand
        x = draw(call.input.shape, generator=torch.Generator().manual_seed(0)).to(call.input)
        before = x.clone()
        try:
            silence_block(silent, Block("", BlockKind.IDENTITY, last=last))
            found = silent(x)
            if shortcut is None:
                return BlockKind.IDENTITY if equal_outputs(found, before) else None
            activation = getattr(silent, ACTIVATION, None)
            if not isinstance(activation, nn.Module):
                return None
            remains = ShortcutBlock({SHORTCUT: silent.get_submodule(SHORTCUT), ACTIVATION: activation})(before)
        except Exception:  # whatever a foreign block raises on an input alone, it is not a residual block
            return None
    return BlockKind.RESIDUAL_BRANCH if equal_outputs(found, remains) else None


def _open_scales(module: nn.Module) -> None:
    """Put 1 where blocks hold scales of their branches: one of 1e-5 would hide a second branch."""
    for part in module.modules():
        if next(part.children(), None) is not None:
            for name, scale in part._parameters.items():
                if scale is not None and is_scale(scale):
                    setattr(part, name, nn.Parameter(torch.ones_like(scale), requires_grad=False))


def equal_outputs(found: object, expected: Tensor) -> bool:
    """Whether a module returned ``expected``, up to rounding."""
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    scale = float(expected.abs().max())
    return float((found - expected).abs().max()) <= TOLERANCE * max(scale, 1e-12)
