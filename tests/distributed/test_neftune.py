"""Noise on the embeddings on several tensor ranks: one and the same, unless each has rows of its own."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.dist import run_ranks
from tests.distributed import uneven
from train.parallel import ParallelContext, split_ranks

pytestmark = pytest.mark.further

RANKS = 2


def noise_of_a_step(context: ParallelContext, sequence_parallel: bool) -> list[torch.Tensor]:
    """What each rank adds to the embeddings of the first micro-batch of a step."""
    context = split_ranks(context, tensor_parallel=RANKS, sequence_parallel=sequence_parallel)
    engine = uneven.make_engine(context, zero=1, precision="fp32", neftune_alpha=5.0)
    found: list[torch.Tensor] = []
    embedding = next(module for module in engine.module.modules() if hasattr(module, "neftune_alpha"))
    draw = embedding._noise

    def kept(*given: torch.Tensor) -> torch.Tensor:
        found.append(draw(*given))
        return found[-1]

    embedding._noise = kept
    engine.train_step(uneven.batches_of_step(0, context), lr=0.0, step=0)
    of_ranks = [torch.empty_like(found[0]) for _ in range(RANKS)]
    dist.all_gather(of_ranks, found[0].detach())
    return of_ranks


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ranks_draw_alike_what_they_hold_alike(sequence_parallel: bool) -> None:
    for first, second in run_ranks(noise_of_a_step, RANKS, sequence_parallel):
        assert first.any() and torch.equal(first, second) != sequence_parallel
