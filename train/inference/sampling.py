"""The choice of the next token: a pure function of logits, settings and one uniform number a sequence.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose: `temperature` 0 takes the likeliest; `top_k` and `top_p` narrow the choice, None: no narrowing."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


def choose(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Tensor:
    """Ids [B]: of each row the likeliest, or the one that `uniform` in [0, 1) falls on.

    top_k keeps the k likeliest; of these, top_p keeps the fewest whose probability reaches p (Holtzman et al. 2020).
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    limit = min(sampling.top_k or logits_BV.shape[1], logits_BV.shape[1])
    logits_BV, ids_BV = torch.topk(logits_BV.float(), limit, dim=-1)  # sorted, the likeliest first
    probability_BV = torch.softmax(logits_BV / sampling.temperature, dim=-1).double()
    reached_BV = probability_BV.cumsum(dim=-1)
    if sampling.top_p is not None:
        # A token is kept when those before it do not reach p yet, so that the first always is.
        probability_BV = probability_BV.where(reached_BV - probability_BV < sampling.top_p, 0.0)
        reached_BV = probability_BV.cumsum(dim=-1)
    aim_B1 = uniform_B.to(reached_BV).unsqueeze(1) * reached_BV[:, -1:]
    chosen_B1 = torch.searchsorted(reached_BV, aim_B1, right=True)
    # Rounding may put the aim at the very end: the last token with a probability is meant.
    last_B1 = (probability_BV > 0).sum(dim=-1, keepdim=True) - 1
    return ids_BV.gather(1, torch.minimum(chosen_B1, last_B1)).squeeze(1)
