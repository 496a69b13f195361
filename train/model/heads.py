"""The heads with their losses: logits of the padded vocabulary, or scores of labels; cross-entropy summed over the targets.

Shapes: T tokens, C tokens of a chunk, P places among the tokens, H hidden, V padded vocabulary (on several tensor ranks: this
rank's rows of it), N labels.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.model.blueprint import Blueprint
from train.model.cost import LABEL_HEAD
from train.model.crossings import all_columns, all_rows, own_rows, replicated, sum_of_parts, vocab_parallel_loss
from train.model.empty import EmptyLinear
from train.model.logical import LogicalTensor, tag
from train.model.tensor_parallel import vocab_embedding, vocab_linear

IGNORE = -100  # label of a position without a target; torch's and the loader's
LOGIT_BYTES = 4  # the loss is taken in fp32


class LossHead(nn.Module):
    """Output matrix, own or tied to the embedding, and the loss."""

    figures: tuple[str, ...] = ()
    """What is summed over the targets besides; a head that has such names returns the sums behind the count of targets."""

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        model = blueprint.model
        self.vocab_size = model.vocab_size
        self.z_loss, self.softcap = model.z_loss, model.logit_softcap
        self.tensor = blueprint.tensor
        rows = model.padded_vocab_size // self.tensor.size
        self.shrink = 1.0 / model.width_ratio
        self.first_id = self.tensor.rank * rows
        self.chunk_tokens = max(1, blueprint.kernels.logits_bytes // (LOGIT_BYTES * rows))
        # A tied head has a weight of the embedding's logical name; the caller puts the embedding's own in its place.
        self.output = vocab_embedding("embedding.tokens", blueprint) if model.tied_head else vocab_linear("head", blueprint)
        self.chunk_loss: Callable[..., tuple[Tensor, Tensor]] = self._loss
        if blueprint.kernels.compile and self.tensor.size == 1:  # megatron-core's loss is one kernel after another anyway
            self.chunk_loss = torch.compile(self._loss, dynamic=False)

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """[T, whole V] in the model's dtype; the columns beyond the real vocabulary hold -inf."""
        return all_columns(self._logits(all_rows(hidden_TH, self.tensor), self.output.weight), self.tensor)

    def answers(self, hidden_TH: Tensor, places_P: Tensor, options_PO: Tensor) -> tuple[Tensor, Tensor]:
        """What follows the tokens at some places: log-probabilities of the options, fp32 [P, O], and the likeliest id [P].

        The logits of the whole vocabulary exist for a chunk of places at a time. Every rank has the answers.
        """
        hidden_PH = all_rows(hidden_TH, self.tensor)[places_P]
        chunk = max(1, self.chunk_tokens // self.tensor.size)
        parts = []
        for hidden_CH, options_CO in zip(hidden_PH.split(chunk), options_PO.split(chunk), strict=True):
            logits_CV = all_columns(self._logits(hidden_CH, self.output.weight), self.tensor).float()
            parts.append((logits_CV.log_softmax(dim=-1).gather(1, options_CO), logits_CV.argmax(dim=-1)))
        log_probability, likeliest = zip(*parts, strict=True)
        return torch.cat(log_probability), torch.cat(likeliest)

    def forward(self, state: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(objective, loss, targets): sums over the targets, fp32, and their number, int64; each a scalar.

        The objective is what is differentiated: the loss, and the z-loss when it is on.
        """
        hidden_TH, labels_T, _, _ = state
        hidden_TH, weight_VH = all_rows(hidden_TH, self.tensor), self.output.weight
        if labels_T.shape[0] <= self.chunk_tokens:
            objective, loss = self.chunk_loss(hidden_TH, weight_VH, labels_T)
        elif torch.is_grad_enabled() and (hidden_TH.requires_grad or weight_VH.requires_grad):
            objective, loss = _ChunkedLoss.apply(hidden_TH, weight_VH, labels_T, self.chunk_tokens, self.chunk_loss)
        else:
            chunks = zip(hidden_TH.split(self.chunk_tokens), labels_T.split(self.chunk_tokens), strict=True)
            parts = [torch.stack(self.chunk_loss(hidden_CH, weight_VH, labels_C)) for hidden_CH, labels_C in chunks]
            objective, loss = torch.stack(parts).sum(dim=0).unbind()
        return objective, loss.detach(), (labels_T != IGNORE).sum()

    def _logits(self, hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
        """[C, V] in the model's dtype, the padded columns -inf."""
        logits_CV = F.linear(hidden_CH * self.shrink if self.shrink != 1.0 else hidden_CH, weight_VH)
        if self.softcap is not None:
            logits_CV = self.softcap * torch.tanh(logits_CV / self.softcap)
        real = max(0, self.vocab_size - self.first_id)
        if real < logits_CV.shape[1]:
            logits_CV[:, real:] = float("-inf")
        return logits_CV

    def _loss(self, hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
        """(objective, loss) of some tokens: sums over their targets, fp32."""
        logits_CV = self._logits(hidden_CH, weight_VH).float()
        if self.tensor.size == 1:
            loss = F.cross_entropy(logits_CV, labels_C, ignore_index=IGNORE, reduction="sum")
            if not self.z_loss:
                return loss, loss
            normaliser_C = torch.logsumexp(logits_CV, dim=-1)
            return loss + self.z_loss * (normaliser_C.square() * (labels_C != IGNORE)).sum(), loss
        counts_C = labels_C != IGNORE
        if not self.z_loss:
            loss = (vocab_parallel_loss(logits_CV, labels_C) * counts_C).sum()
            return loss, loss
        loss_C = vocab_parallel_loss(logits_CV.clone(), labels_C)
        loss = (loss_C * counts_C).sum()
        # The loss is the log of the softmax's denominator less the target's logit.
        normaliser_C = loss_C + self._target_logits(logits_CV, labels_C)
        return loss + self.z_loss * (normaliser_C.square() * counts_C).sum(), loss

    def _target_logits(self, logits_CV: Tensor, labels_C: Tensor) -> Tensor:
        """[C]: the logit of each target, wherever its column lies; 0 without a target."""
        local_C = labels_C - self.first_id
        here_C = (local_C >= 0) & (local_C < logits_CV.shape[1]) & (labels_C != IGNORE)
        found_C = logits_CV.gather(1, local_C.where(here_C, 0).unsqueeze(1)).squeeze(1)
        return sum_of_parts(found_C.where(here_C, 0.0), self.tensor)


class ClassificationHead(nn.Module):
    """Scores of the model's labels at every token, and the loss of those tokens that have a label: the last of each row.

    All tensor ranks hold the whole matrix. Scores are taken at every token, not at the labelled ones alone: there are few
    labels, so they cost nothing beside a block, and neither a shape nor the CPU waits for where the labels lie.
    """

    figures: tuple[str, ...] = ()

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        model = blueprint.model
        self.vocab_size = model.vocab_size
        self.z_loss, self.shrink = model.z_loss, 1.0 / model.width_ratio
        self.tensor = blueprint.tensor
        shape = (len(model.labels), model.hidden_size)
        self.score = EmptyLinear(model.hidden_size, len(model.labels), bias=False)
        tag(self.score.weight, LogicalTensor(name=LABEL_HEAD, shape=shape))

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """[T, N] in the model's dtype, the same on every tensor rank; no gradient is right across the ranks."""
        return all_rows(self._scores(hidden_TH, self.score.weight), self.tensor)

    def scores(self, hidden_TH: Tensor, places_P: Tensor) -> Tensor:
        """Log-probabilities of the labels at some places, fp32 [P, N]; every rank has them."""
        return self.logits(hidden_TH)[places_P].float().log_softmax(dim=-1)

    def answers(self, hidden_TH: Tensor, places_P: Tensor, options_PO: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities at some places of the labels with the numbers `options_PO`, fp32 [P, O], and the likeliest [P]."""
        scores_PN = self.scores(hidden_TH, places_P)
        return scores_PN.gather(1, options_PO), scores_PN.argmax(dim=-1)

    def forward(self, state: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(objective, loss, targets): as of `LossHead`; a label is the number of one of the model's, IGNORE between them."""
        hidden_TH, labels_T, _, _ = state
        # Under sequence parallelism each rank has the loss of its own rows; otherwise all of them compute the same.
        weight_NH = replicated(self.score.weight, self.tensor, partial=False)
        scores_TN, own_T = self._scores(hidden_TH, weight_NH).float(), own_rows(labels_T, self.tensor)
        loss = F.cross_entropy(scores_TN, own_T, ignore_index=IGNORE, reduction="sum")
        objective = loss
        if self.z_loss:
            normaliser_T = torch.logsumexp(scores_TN, dim=-1)
            objective = loss + self.z_loss * (normaliser_T.square() * (own_T != IGNORE)).sum()
        if self.tensor.sequence_parallel:
            objective, loss = sum_of_parts(torch.stack((objective, loss)), self.tensor).unbind()
        return objective, loss.detach(), (labels_T != IGNORE).sum()

    def _scores(self, hidden_TH: Tensor, weight_NH: Tensor) -> Tensor:
        return F.linear(hidden_TH * self.shrink if self.shrink != 1.0 else hidden_TH, weight_NH)


class _ChunkedLoss(torch.autograd.Function):
    """Head and loss over chunks of tokens, so that the logits of all of them never exist together.

    The gradients are made at once, chunk by chunk, while its logits are there: nothing is computed twice, as it would
    be if chunks were recomputed in the backward pass; the price is the head's gradient, held from the forward pass on.
    Idea: Liger Kernel's fused linear cross-entropy (Hsu et al. 2024).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, chunk: int, chunk_loss: Callable
    ) -> tuple[Tensor, Tensor]:
        # Only what is asked for is given memory and computed: a head may be frozen, or train alone.
        wanted = (hidden_TH.requires_grad, weight_VH.requires_grad)
        grad_hidden_TH = torch.empty_like(hidden_TH) if wanted[0] else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if wanted[1] else None
        sums = torch.zeros(2, dtype=torch.float32, device=hidden_TH.device)
        weight_VH = weight_VH.detach().requires_grad_(wanted[1])
        for first in range(0, hidden_TH.shape[0], chunk):
            rows = slice(first, first + chunk)
            hidden_CH = hidden_TH[rows].detach().requires_grad_(wanted[0])
            with torch.enable_grad():
                objective, loss = chunk_loss(hidden_CH, weight_VH, labels_T[rows])
                found = list(torch.autograd.grad(objective, list(compress((hidden_CH, weight_VH), wanted))))
            if wanted[1]:
                grad_weight_VH += found.pop()
            if wanted[0]:
                grad_hidden_TH[rows] = found.pop()
            sums += torch.stack((objective.detach(), loss.detach()))
        ctx.save_for_backward(grad_hidden_TH, grad_weight_VH.to(weight_VH.dtype) if wanted[1] else None)
        objective, loss = sums.unbind()
        ctx.mark_non_differentiable(loss)
        return objective, loss

    @staticmethod
    def backward(ctx: Any, grad_objective: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden_TH, of_weight_VH = (grad if grad is None else grad * grad_objective for grad in ctx.saved_tensors)
        return of_hidden_TH, of_weight_VH, None, None, None
