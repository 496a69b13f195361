"""The head for preferences against formulas in float64: log-probabilities, losses, gradients, on one rank and on two."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.dist import run_ranks
from tests.models import initialised
from tests.parity.pairs import CASES, VOCAB_SIZE
from train.config.kernels import KernelsConfig
from train.config.preference import PreferenceConfig
from train.model.blueprint import Blueprint
from train.model.heads import IGNORE
from train.model.preference import PreferenceHead
from train.parallel import ALONE, TensorRanks, split_ranks

BOUNDS = torch.tensor([0, 9, 21, 30, 40, 57, 64, 80, 80, 80, 80], dtype=torch.int32)
ROWS = ((0, 9), (9, 21), (40, 57), (64, 80))  # between them, and in between two rows of a pair, padding
REFERENCES = torch.tensor([-30.0, -40.0, 0, 0, -50.0, 0, -45.0, 0, 0, 0, 0])
MODEL = replace(CASES["llama-gqa"], init_std=0.1)
VARIANTS = {
    "sigmoid": PreferenceConfig(beta=0.3),
    "smoothed": PreferenceConfig(beta=0.1, label_smoothing=0.2),
    "ipo": PreferenceConfig(beta=0.3, loss="ipo"),
}


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden_TH = torch.randn(80, MODEL.hidden_size, generator=generator)
    found_T = torch.randint(VOCAB_SIZE, (80,), generator=generator)
    labels_T = torch.full((80,), IGNORE)
    for first, last in ROWS:
        labels_T[first + 3 : last] = found_T[first + 3 : last]
    return hidden_TH, labels_T


def computed(settings: PreferenceConfig, tensor: TensorRanks = ALONE, logits_bytes: int = 1 << 30) -> list[Tensor]:
    """Loss, pairs, figures, gradient of the hidden states, and of the matrix."""
    kernels = KernelsConfig(logits_bytes=logits_bytes)
    blueprint = Blueprint(model=MODEL, preference=settings, tensor=tensor, kernels=kernels)
    head = initialised(PreferenceHead(blueprint), MODEL, seed=3)
    hidden_TH, labels_T = inputs()
    hidden_TH.requires_grad_()
    objective, loss, pairs, figures_F = head((hidden_TH, labels_T, None, BOUNDS, REFERENCES))
    (objective / 2).backward()
    return [loss, pairs, figures_F, hidden_TH.grad, head.output.weight.grad]


def exact(settings: PreferenceConfig) -> list[Tensor]:
    """The same by the formulas of the papers, row by row."""
    weight_VH = initialised(PreferenceHead(Blueprint(model=MODEL, preference=settings)), MODEL, seed=3).output.weight
    weight_VH = weight_VH.detach().double().requires_grad_()
    hidden_TH, labels_T = inputs()
    hidden_TH = hidden_TH.double().requires_grad_()
    ratios, means = [], []
    for (first, last), place in zip(ROWS, (0, 1, 4, 6), strict=True):
        logits_NV = hidden_TH[first + 3 : last] @ weight_VH[:VOCAB_SIZE].T
        found_N = logits_NV.log_softmax(dim=1).gather(1, labels_T[first + 3 : last, None])
        ratios.append(found_N.sum() - REFERENCES[place].double())
        means.append(ratios[-1] / len(found_N))
    losses = []
    for chosen, rejected in ((0, 1), (2, 3)):
        margin, smoothing = settings.beta * (ratios[chosen] - ratios[rejected]), settings.label_smoothing
        if settings.loss == "ipo":
            losses.append((means[chosen] - means[rejected] - 1 / (2 * settings.beta)) ** 2)
        else:
            losses.append(-(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin))
    (sum(losses) / 2).backward()
    rewards = [settings.beta * ratio.detach() for ratio in ratios]
    margins = [rewards[0] - rewards[1], rewards[2] - rewards[3]]
    figures = [sum(margin > 0 for margin in margins), sum(margins), rewards[0] + rewards[2], rewards[1] + rewards[3]]
    return [
        sum(losses).detach(),
        torch.tensor(2),
        torch.tensor([float(value) for value in figures]),
        hidden_TH.grad,
        weight_VH.grad,
    ]


def compare(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("logits_bytes", [1 << 30, 16 * 4 * MODEL.padded_vocab_size], ids=["at once", "in chunks"])
def test_losses_and_gradients_in_float64(variant: str, logits_bytes: int) -> None:
    found = computed(VARIANTS[variant], logits_bytes=logits_bytes)
    expected = exact(VARIANTS[variant])
    assert found[4][VOCAB_SIZE:].abs().max() == 0
    compare([*found[:4], found[4][:VOCAB_SIZE]], [*expected[:4], expected[4][:VOCAB_SIZE]])


def on_tensor_ranks(context, settings: PreferenceConfig, logits_bytes: int) -> list:
    tensor = split_ranks(context, tensor_parallel=context.world_size).tensor
    return [value.numpy() for value in computed(settings, tensor, logits_bytes)]


@pytest.mark.parametrize("logits_bytes", [1 << 30, 16 * 4 * MODEL.padded_vocab_size // 2], ids=["at once", "in chunks"])
def test_two_ranks_of_the_vocabulary_give_the_loss_of_one(logits_bytes: int) -> None:
    expected = computed(VARIANTS["sigmoid"])
    ranks = [
        [torch.as_tensor(value) for value in rank] for rank in run_ranks(on_tensor_ranks, 2, VARIANTS["sigmoid"], logits_bytes)
    ]
    for rank in ranks:
        compare(rank[:4], expected[:4])
    compare([torch.cat([rank[4] for rank in ranks])], expected[4:])


def test_without_a_reference_rows_count_by_themselves() -> None:
    head = initialised(PreferenceHead(Blueprint(model=MODEL, preference=VARIANTS["sigmoid"])), MODEL, seed=3)
    hidden_TH, labels_T = inputs()
    state = (hidden_TH, labels_T, None, BOUNDS)
    assert torch.equal(head(state)[0], head((*state, torch.zeros(len(BOUNDS))))[0])
    nothing = head((hidden_TH, torch.full_like(labels_T, IGNORE), None, BOUNDS))
    assert [value.sum().item() for value in nothing] == [0, 0, 0, 0], "a micro-batch may hold no pair"
