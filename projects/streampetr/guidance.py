"""Guidance of the cross-attention: early in a training from nothing, queries learn to look where they are.

Without it a small StreamPETR that starts from random weights stays on a plateau on which its attention has nothing to
do with the position of the query. The loss needs no ground truth and is switched off after a few hundred iterations.
"""

from __future__ import annotations

import torch
from mmdet3d.registry import MODELS
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from .attention import MultiheadAttention
from .train_loop import unwrapped


def projected_tokens(points: Tensor, lidar2img: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Tokens into which points project.

    Args:
        points: (B, n, 3) metres in the lidar frame.
        lidar2img: (B, N, 4, 4).
        height: Rows of tokens per camera.
        width: Columns of tokens per camera.
        stride: Pixels per token.

    Returns:
        (B, n, N * height * width) mask; a row has one token per camera that sees the point.
    """
    homogeneous = torch.cat((points, torch.ones_like(points[..., :1])), dim=-1)
    pixels = torch.einsum("bkij,bnj->bnki", lidar2img, homogeneous)
    depth = pixels[..., 2]
    cells = (pixels[..., :2] / depth.clamp(min=1e-5).unsqueeze(-1) / stride).floor()
    limit = cells.new_tensor([width, height])
    seen = (depth > 0) & (cells >= 0).all(dim=-1) & (cells < limit).all(dim=-1)
    index = (cells[..., 1] * width + cells[..., 0]).where(seen, torch.zeros_like(depth)).long()
    mask = torch.zeros(*seen.shape, height * width, dtype=torch.bool, device=points.device)
    return mask.scatter_(3, index.unsqueeze(-1), seen.unsqueeze(-1)).flatten(2)


@MODELS.register_module()
class AttentionGuidance(nn.Module):
    """Minus the log of the attention that a query pays to the tokens it projects into, over all layers and heads.

    Args:
        weight: Factor of the loss.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.active = True
        self._logits: list[Tensor] = []

    def watch(self, decoder: nn.Module) -> None:
        """Listen to the cross-attentions of ``decoder`` whenever it trains and the guidance is active.

        Raises:
            ValueError: The decoder recomputes its activations; every attention would be recorded twice.
        """
        if decoder.with_cp:
            raise ValueError("guidance does not go with activation checkpointing: set decoder.with_cp=False")
        for layer in decoder.layers:
            layer.attentions[1].attn.register_forward_pre_hook(self._record)

    def _record(self, attention: MultiheadAttention, args: tuple) -> None:
        if self.active and attention.training:
            self._logits.append(attention.logits(args[0], args[1]))

    def losses(self, tokens: Tensor) -> dict[str, Tensor]:
        """Loss of the attentions recorded since the last call.

        Args:
            tokens: (B, n, M) of `projected_tokens`; queries that no camera sees do not count.

        Returns:
            ``guidance_loss`` and, for the log, ``guidance_mass``: the mean attention paid to these tokens. Empty if
            nothing was recorded.
        """
        recorded, self._logits = self._logits, []
        if not recorded:
            return {}
        seen = tokens.any(dim=-1)
        hidden = ~tokens.unsqueeze(1)
        losses, masses = [], []
        for logits in recorded:
            log_mass = logits.masked_fill(hidden, float("-inf")).logsumexp(dim=-1) - logits.logsumexp(dim=-1)
            log_mass = log_mass.transpose(1, 2)[seen]
            losses.append(-log_mass.sum() / max(log_mass.numel(), 1))
            masses.append(log_mass.detach().exp().sum() / max(log_mass.numel(), 1))
        return {"guidance_loss": self.weight * torch.stack(losses).mean(), "guidance_mass": torch.stack(masses).mean()}


@HOOKS.register_module()
class GuidanceHook(Hook):
    """Switch the guidance of a detector off after a number of iterations.

    Args:
        iterations: Iterations with guidance.
    """

    def __init__(self, iterations: int = 400) -> None:
        self.iterations = iterations

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Set the guidance's state for the coming iteration."""
        guidance = unwrapped(runner.model).guidance
        if guidance is None:
            raise ValueError("GuidanceHook needs a detector with guidance=dict(type='AttentionGuidance')")
        guidance.active = runner.iter < self.iterations
