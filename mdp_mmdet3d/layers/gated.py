"""Learned queries, each with a gate: open it is there, closed it says nothing to anybody."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOST = 30.0  # of a logit in an exponential


class GatedEmbedding(nn.Embedding):
    """Learned queries, one per row, whose model asks for their gates.

    A query's gate is a factor of the weight that it has as a key in every self-attention and of its class
    probabilities. At 0 the others do not see it and what it predicts is left out: the query is masked. Gates are no
    part of the state dict, and there are none as a rule.

    Attributes:
        gates: (num_embeddings,) in [0, 1], or None: all open.
        scores: (num_embeddings,) class probabilities that `note_scores` was last told; None where it never was.
    """

    gates: Tensor | None = None
    scores: Tensor | None = None

    def open_gates(self) -> Tensor:
        """Set gates of 1 that can be differentiated; returns them."""
        self.gates = torch.ones_like(self.weight[:, 0], requires_grad=True)
        return self.gates

    def mask(self, keep: Tensor) -> None:
        """Close the gates of the queries that ``keep`` (num_embeddings,), boolean, leaves out."""
        self.gates = keep.to(self.weight)

    def key_bias(self) -> Tensor | None:
        """(num_embeddings,) summand of a self-attention's logits by key: the log of the gates; None: all open."""
        return None if self.gates is None else self.gates.log()

    def left(self) -> Tensor | None:
        """Indices of the queries whose gates are not closed; None: all."""
        if self.gates is None or bool(self.gates.detach().all()):
            return None
        return self.gates.nonzero().flatten()

    def gated_logits(self, logits: Tensor) -> Tensor:
        """Class logits (..., num_embeddings, classes) whose probabilities are multiplied by the gates.

        Closed ones stay as they are: `left` leaves them out.
        """
        if self.gates is None:
            return logits
        gates = self.gates.where(self.gates > 0, torch.ones_like(self.gates)).unsqueeze(-1)
        # log(g s / (1 - g s)) with s = sigmoid(x) is x + log g - log(1 + (1 - g) e^x).
        return logits + gates.log() - torch.log1p((1 - gates) * logits.clamp(max=MOST).exp())

    def note_scores(self, scores: Tensor) -> None:
        """Tell what the queries scored: (num_embeddings,) probabilities."""
        self.scores = scores.detach()
