"""Runs of StreamPETR's head as its graphs are deployed, on noise: what depends on what, and at which shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .memory import MemoryState

HEAD = "pts_bbox_head"
LAYERS = f"{HEAD}.transformer.decoder.layers"
SMALL = (1, 2, 3)
"""Cameras, rows and columns of tokens of a frame to look at shapes with."""


class HeadRuns:
    """Runs a frame of noise through the head of a model, dense or cut.

    Everything that the graphs are given is made once: export folds what they make themselves.

    Args:
        model: The dense model.
        maps: Cameras, rows and columns of tokens.
    """

    def __init__(self, model: nn.Module, maps: tuple[int, int, int]) -> None:
        head = model.get_submodule(HEAD)
        cameras, rows, columns = maps
        self.pixels = (rows * head.stride, columns * head.stride)
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(head.pc_range)

        self.features = noise(1, cameras, head.memory_embed[0].in_features, rows, columns)
        self.positions = noise(1, cameras * rows * columns, head.embed_dims)
        self.cone = noise(1, cameras * rows * columns, 8)
        self.pose = torch.eye(4).to(head.pc_range)[None]
        self.rig = self.pose[0].expand(1, cameras, 4, 4)
        memory = head.initial_memory(self.pose)
        self.memory = MemoryState(*(noise(*value.shape) for value in memory))._replace(egopose=memory.egopose)

    def position_embedding(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """The graph that runs once per rig."""
        found: tuple[Tensor, Tensor] = model.get_submodule(HEAD).position_embedding(self.pixels, self.rig, self.rig)
        return found

    def head(self, model: nn.Module) -> Any:
        """The graph that runs every frame."""
        return self._run(model, self.positions[..., : model.get_submodule(HEAD).embed_dims], self.cone)

    def frame(self, model: nn.Module) -> Any:
        """Both."""
        return self._run(model, *self.position_embedding(model))

    def _run(self, model: nn.Module, positions: Tensor, cone: Tensor) -> Any:
        head = model.get_submodule(HEAD)
        features = self.features[:, :, : head.memory_embed[0].in_features]
        if not head.remembers:
            return head.predict(features, positions, cone, head.empty_memory(1), last_level_only=True)
        memory = self.memory._replace(embedding=self.memory.embedding[..., : head.embed_dims])
        return head(features, positions, cone, self.pose, self.pose, memory, last_level_only=True)
