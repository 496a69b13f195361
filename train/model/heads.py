"""The loss head: logits of the padded vocabulary, cross-entropy summed over the targets.

Shapes: T tokens, H hidden, V padded vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.model.blueprint import Blueprint
from train.model.tensor_parallel import vocab_embedding, vocab_linear

IGNORE = -100  # label of a position without a target; torch's and the loader's


class LossHead(nn.Module):
    """Output matrix, own or tied to the embedding, and the loss."""

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        model = blueprint.model
        self.vocab_size = model.vocab_size
        self.z_loss = model.z_loss
        # A tied head has a weight of the embedding's logical name; the caller puts the embedding's own in its place.
        self.output = vocab_embedding("embedding.tokens", blueprint) if model.tied_head else vocab_linear("head", blueprint)

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """[T, V] in the model's dtype; the columns beyond the real vocabulary hold -inf."""
        logits_TV = F.linear(hidden_TH, self.output.weight)
        if self.vocab_size < logits_TV.shape[1]:
            logits_TV[:, self.vocab_size :] = float("-inf")
        return logits_TV

    def forward(self, state: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(objective, loss, targets): sums over the targets, fp32, and their number, int64; each a scalar.

        The objective is what is differentiated: the loss, and the z-loss when it is on.
        """
        hidden_TH, labels_T, _, _ = state
        logits_TV = self.logits(hidden_TH).float()
        loss = F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORE, reduction="sum")
        targets = (labels_T != IGNORE).sum()
        objective = loss
        if self.z_loss:
            square_T = torch.logsumexp(logits_TV, dim=-1).square()
            objective = loss + self.z_loss * (square_T * (labels_T != IGNORE)).sum()
        return objective, loss.detach(), targets
