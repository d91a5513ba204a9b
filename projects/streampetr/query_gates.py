"""What the gates of learned queries do in a StreamPETR: `GatedEmbedding` says what they mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .head import AlignedQueries, HeadOutput, StreamPETRHead


def gated_mask(head: StreamPETRHead, queries: AlignedQueries, mask: Tensor | None) -> Tensor | None:
    """Mask of the self-attention in which learned queries weigh what their gates say.

    Args:
        head: Has the gates.
        queries: Denoising, learned and propagated ones, and the memory rows behind them.
        mask: (n, n + r) boolean, True where blocked.

    Returns:
        ``mask`` where there are no gates, else (n or 1, n + r) summands of the logits.
    """
    bias = head.reference_points.key_bias()
    if bias is None:
        return mask
    behind = head.num_propagated + queries.temp_memory.shape[1]
    before = queries.tgt.shape[1] - len(bias) - head.num_propagated
    bias = nn.functional.pad(bias, (before, behind))
    return bias[None] if mask is None else bias.expand(mask.shape).masked_fill(mask, float("-inf"))


def gated_output(head: StreamPETRHead, output: HeadOutput) -> HeadOutput:
    """Predictions with the gates of the learned queries; those of closed ones are left out."""
    learned = head.reference_points
    if learned.gates is None:
        return output
    n = output.reference_points.shape[1]
    start, end = n - head.num_propagated - learned.num_embeddings, n - head.num_propagated
    scores = output.all_cls_scores
    learned.note_scores(scores[-1, :, start:end].sigmoid().amax(dim=-1).mean(dim=0))
    parts = (scores[:, :, :start], learned.gated_logits(scores[:, :, start:end]), scores[:, :, end:])
    scores = torch.cat(parts, dim=2)
    if (left := learned.left()) is None:
        return output._replace(all_cls_scores=scores)
    rows = torch.cat((torch.arange(start).to(left), start + left, torch.arange(end, n).to(left)))
    return output._replace(
        all_cls_scores=scores[:, :, rows],
        all_bbox_preds=output.all_bbox_preds[:, :, rows],
        embedding=output.embedding[:, rows],
        reference_points=output.reference_points[:, rows],
    )
