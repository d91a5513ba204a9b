"""What `mdp_mmdet3d` has to be told about this detector; everything else it finds by itself.

Channels are traced, residual blocks are found by what they do without their branch, and both are verified, all by
`SingleGraph`. Three things it cannot know: which loss is of the deployed model, which parameters stay behind, and which
metric counts. A fourth shows how a part is left alone.
"""

from __future__ import annotations

from torch import nn

from mdp_mmdet3d.adapters import SingleGraph, register_adapter
from mdp_mmdet3d.space.builder import SpaceBuilder


@register_adapter
class MarkerAdapter(SingleGraph):
    """Found by the class of the model; ``prune=dict(adapter=dict(type="MarkerAdapter"))`` names it as well."""

    models = ("MarkerDetector",)
    headline = ("recall",)
    supervision = ("aux_*",)  # what the edge head says nothing about is no loss of the deployed model
    training_only = ("edges.",)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The one class there is."""
        return ("marker",)

    def add_to_space(self, builder: SpaceBuilder, model: nn.Module) -> None:
        """All that is found, but the first block: say, since another program reads what it gives."""
        builder.exclude("blocks.0", "another program reads what it gives")
        super().add_to_space(builder, model)
