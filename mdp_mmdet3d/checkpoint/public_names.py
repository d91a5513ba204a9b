"""Names that torchvision and timm give to the weights of classifiers, and what MMPretrain calls them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

# Positions of VGG16's convolutions: torchvision counts activations, MMPretrain has them within its ConvModules.
_VGG16 = dict(zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (0, 1, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15, 16)))

Rules = tuple[tuple[str, str], ...]
TABLES: dict[str, tuple[str, Rules]] = {
    "ResNet of torchvision or timm": (
        "layer1.0.conv1.weight",
        ((r"^fc\.", "head.fc."), (r"^(?=conv|bn|layer)", "backbone.")),
    ),
    "ViT or DeiT of timm": (
        "blocks.0.attn.qkv.weight",
        (
            (r"^head\.", "head.layers.head."),
            (r"^patch_embed\.proj\.", "backbone.patch_embed.projection."),
            (r"^(cls_token|pos_embed)$", r"backbone.\1"),
            (r"^norm\.", "backbone.ln1."),
            (r"^blocks\.(\d+)\.norm([12])\.", r"backbone.layers.\1.ln\2."),
            (r"^blocks\.(\d+)\.attn\.", r"backbone.layers.\1.attn."),
            (r"^blocks\.(\d+)\.mlp\.fc1\.", r"backbone.layers.\1.ffn.layers.0.0."),
            (r"^blocks\.(\d+)\.mlp\.fc2\.", r"backbone.layers.\1.ffn.layers.1."),
        ),
    ),
    "VGG16 of torchvision": (
        "features.28.weight",
        (
            *((rf"^features\.{there}\.", f"backbone.features.{here}.conv.") for there, here in _VGG16.items()),
            (r"^classifier\.", "backbone.classifier."),
        ),
    ),
}
"""What is recognised: a name that only its files have, and patterns with what replaces them; the first match counts."""


def to_mmpretrain(state: Mapping[str, Tensor], own: Collection[str]) -> tuple[dict[str, Tensor], str]:
    """Give the weights of a public classifier the names that a model has.

    Args:
        state: Tensors by name, without prefixes of data parallel and the like.
        own: Names of the model.

    Returns:
        The tensors, and what they were recognised as: empty where nothing was renamed, because they have the model's
        names already or no table gives them one of these.
    """
    if not any(key in own for key in state):
        for what, (mark, rules) in TABLES.items():
            renamed = {_renamed(key, rules): value for key, value in state.items()}
            if mark in state and len(renamed) == len(state) and any(key in own for key in renamed):
                return renamed, what
    return dict(state), ""


def _renamed(key: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name, count = re.subn(pattern, replacement, key)
        if count:
            return name
    return key
