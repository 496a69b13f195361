"""The choice of a token against probabilities written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from train.inference.sampling import Sampling, choose

PROBABILITIES = [0.5, 0.05, 0.25, 0.2]  # likeliest first: ids 0, 2, 3, 1
LOGITS_14 = torch.tensor([PROBABILITIES]).log()


def _counts(sampling, logits_1V=LOGITS_14, draws=1000):
    """How often each id is chosen when the uniform number runs evenly over [0, 1)."""
    uniform_B = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    chosen_B = choose(logits_1V.expand(draws, -1), uniform_B, sampling)
    return torch.bincount(chosen_B, minlength=logits_1V.shape[1]).tolist()


def test_temperature_zero_takes_the_likeliest():
    assert choose(LOGITS_14, torch.tensor([0.99]), Sampling(temperature=0)).tolist() == [0]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), PROBABILITIES),
        (Sampling(temperature=0.5), [p**2 / sum(q**2 for q in PROBABILITIES) for p in PROBABILITIES]),
        (Sampling(top_k=2), [0.5 / 0.75, 0, 0.25 / 0.75, 0]),
        (Sampling(top_k=99), PROBABILITIES),
        (Sampling(top_p=0.5), [1, 0, 0, 0]),
        (Sampling(top_p=0.51), [0.5 / 0.75, 0, 0.25 / 0.75, 0]),
        (Sampling(top_p=1e-9), [1, 0, 0, 0]),
        (Sampling(top_p=1.0), PROBABILITIES),
        (Sampling(top_k=3, top_p=0.6), [0.5 / 0.75, 0, 0.25 / 0.75, 0]),
    ],
    ids=str,
)
def test_shares_of_evenly_spread_draws(sampling, expected):
    for count, share in zip(_counts(sampling), expected, strict=True):
        assert count == pytest.approx(1000 * share, abs=1.5)


def test_masked_ids_are_never_chosen():
    logits_1V = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    counts = _counts(Sampling(temperature=5.0), logits_1V)
    assert counts[0] == counts[3] == 0
    last = choose(logits_1V, torch.tensor([1.0 - 2**-53], dtype=torch.float64), Sampling())
    assert last.item() in (1, 2)


def test_rows_are_chosen_apart():
    logits_BV = torch.tensor([[0.0, 9.0], [9.0, 0.0]])
    assert choose(logits_BV, torch.tensor([0.5, 0.5]), Sampling()).tolist() == [1, 0]
