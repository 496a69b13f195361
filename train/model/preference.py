"""The head for preferences: log-probabilities of rows, and the loss of pairs of them against a reference.

Shapes: T tokens, C tokens of a chunk, H hidden, V padded vocabulary (on several tensor ranks: this rank's rows of it), D places
of the document bounds, P = D // 2 pairs at most, F figures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from train.model.attention.layout import document_of_tokens
from train.model.blueprint import Blueprint
from train.model.crossings import all_rows, vocab_parallel_loss
from train.model.heads import IGNORE, LossHead


class PreferenceHead(LossHead):
    """A language model's head whose loss is of pairs of rows: one that is preferred, and behind it the one that is not.

    The rows of a micro-batch are the documents that hold targets, in their order; padding holds none. What the reference
    gives each document stands at the document's place in the bounds.
    """

    figures = ("reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected")

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__(blueprint)
        assert blueprint.preference is not None, "a head for preferences has their settings"
        self.settings = blueprint.preference

    def log_probabilities(self, state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Sum over the targets of each document, fp32 [D], and their number, int64 [D]; every rank has them.

        They are added up in an order that is always the same, so that a step that is done again gives the same bits.
        """
        hidden_TH, labels_T, _, bounds_D, *_ = state
        hidden_TH, weight_VH = all_rows(hidden_TH, self.tensor), self.output.weight
        chunk, in_chunks = self.chunk_tokens, labels_T.shape[0] > self.chunk_tokens
        parts = []
        for hidden_CH, labels_C in zip(hidden_TH.split(chunk), labels_T.split(chunk), strict=True):
            if in_chunks and torch.is_grad_enabled():
                # What a token's gradient is follows from all of its pair, so each chunk's logits are made a second time.
                given = (hidden_CH, weight_VH, labels_C)
                parts.append(checkpoint(self._of_tokens, *given, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._of_tokens(hidden_CH, weight_VH, labels_C))
        found_T = torch.cat(parts)
        place_D1 = torch.arange(bounds_D.shape[0], device=bounds_D.device).unsqueeze(1)
        is_inside_DT = document_of_tokens(bounds_D, labels_T.shape[0]) - 1 == place_D1
        sums_D = found_T.where(is_inside_DT, 0.0).sum(dim=1)
        return sums_D, (is_inside_DT & (labels_T != IGNORE)).sum(dim=1)

    def forward(self, state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(objective, loss, pairs, figures [F]): sums over the pairs, fp32, and their number, int64.

        `state` ends with the log-probabilities of the reference, fp32 [D]; without them they are taken to be 0.
        """
        found_D, targets_D = self.log_probabilities(state)
        if len(state) > 4:
            found_D = found_D - state[4]
        places_D = (targets_D == 0).int().argsort(stable=True)  # the rows first, in their order
        chosen_P, rejected_P = places_D[: len(places_D) // 2 * 2].unflatten(0, (-1, 2)).unbind(dim=1)
        is_pair_P = targets_D[rejected_P] > 0
        settings = self.settings
        rewards_2P = settings.beta * torch.stack((found_D[chosen_P], found_D[rejected_P]))
        if settings.loss == "ipo":
            means_D = found_D / targets_D.clamp(min=1)
            loss_P = (means_D[chosen_P] - means_D[rejected_P] - 1 / (2 * settings.beta)).square()
        else:
            margin_P, smoothing = rewards_2P[0] - rewards_2P[1], settings.label_smoothing
            loss_P = -(1 - smoothing) * F.logsigmoid(margin_P) - smoothing * F.logsigmoid(-margin_P)
        loss = loss_P.where(is_pair_P, 0.0).sum()
        chosen, rejected = rewards_2P.detach().where(is_pair_P, 0.0)
        figures_F = torch.stack(((chosen > rejected).sum(), (chosen - rejected).sum(), chosen.sum(), rejected.sum()))
        return loss, loss.detach(), is_pair_P.sum(), figures_F

    def _of_tokens(self, hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor) -> Tensor:
        """Log-probability of each target, fp32 [C]; 0 without one."""
        logits_CV = self._logits(hidden_CH, weight_VH).float()
        if self.tensor.size == 1:
            return -F.cross_entropy(logits_CV, labels_C, ignore_index=IGNORE, reduction="none")
        return -vocab_parallel_loss(logits_CV, labels_C).where(labels_C != IGNORE, 0.0)
