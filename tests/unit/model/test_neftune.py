"""Noise on the embeddings (NEFTune): its distribution, the length that it is of, and where there is none.

Jain et al. 2023 draw from [-1, 1] and multiply with alpha / sqrt(L d), L the tokens of the sequence itself; TRL takes the
padded length of its batch. Rows that share a sequence here have each the noise of their own length.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.distributed import uneven
from train.model.blueprint import Blueprint
from train.model.transformer import Embedding

ALPHA = 5.0
MODEL = replace(uneven.TINY, hidden_size=256, num_heads=4, max_positions=1024)
BOUNDS = torch.tensor([0, 16, 272, 1024, 1024], dtype=torch.int32)  # rows of 16, 256 and 752 tokens
TOKENS = torch.arange(1024) % MODEL.vocab_size
POSITIONS = torch.cat([torch.arange(16), torch.arange(256), torch.arange(752)])


def embedding(alpha: float | None, **model) -> Embedding:
    module = Embedding(Blueprint(model=replace(MODEL, **model), neftune_alpha=alpha))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return module.train()


def noise(module: Embedding, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return (module((TOKENS, TOKENS, POSITIONS, BOUNDS))[0] - module.embed(TOKENS, POSITIONS)).detach()


def test_each_row_has_uniform_noise_of_its_own_length() -> None:
    noise_TH = noise(embedding(ALPHA))
    for first, last in ((0, 16), (16, 272), (272, 1024)):
        bound = ALPHA / ((last - first) * 256) ** 0.5
        of_row = noise_TH[first:last].flatten() / bound
        assert of_row.abs().max() <= 1 + 1e-4 and of_row.abs().max() > 0.99
        assert of_row.mean().abs() < 5 / (3 * of_row.numel()) ** 0.5  # five standard errors
        quarters = torch.histc(of_row, bins=4, min=-1, max=1) / of_row.numel()
        torch.testing.assert_close(quarters, torch.full((4,), 0.25), atol=0.02, rtol=0)


def test_what_shares_a_sequence_does_not_count() -> None:
    """A row by itself has the noise that it has beside others."""
    torch.manual_seed(0)
    alone = embedding(ALPHA)((TOKENS[:16], TOKENS[:16], POSITIONS[:16], torch.tensor([0, 16, 16], dtype=torch.int32)))[0]
    torch.manual_seed(0)
    together = embedding(ALPHA)((TOKENS, TOKENS, POSITIONS, BOUNDS))[0]
    torch.testing.assert_close(alone, together[:16], rtol=0, atol=1e-6)


def test_a_state_of_the_generator_gives_the_same_noise_again() -> None:
    module = embedding(ALPHA)
    assert torch.equal(noise(module), noise(module)) and not torch.equal(noise(module), noise(module, seed=1))


@pytest.mark.parametrize(("alpha", "training"), [(None, True), (ALPHA, False)])
def test_there_is_none_without_it_and_none_in_an_evaluation(alpha: float | None, training: bool) -> None:
    assert not noise(embedding(alpha).train(training)).any()


def test_the_dtype_is_that_of_the_embedding() -> None:
    module = embedding(ALPHA, family="custom", positions="learned").bfloat16()
    assert module((TOKENS, TOKENS, POSITIONS, BOUNDS))[0].dtype == torch.bfloat16
