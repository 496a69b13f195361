"""The loss head against float64 formulas; the padded vocabulary takes no part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.parity.pairs import CASES, VOCAB_SIZE, gradients_of, make_pair, whole_sequence_inputs
from train.model.blueprint import Blueprint
from train.model.heads import IGNORE, LossHead
from train.model.transformer import initialise

TOLERANCE = 1e-5


def _head_and_inputs(z_loss: float):
    model = replace(CASES["llama-gqa"], z_loss=z_loss, init_std=0.1)
    head = initialise(LossHead(Blueprint(model=model)), model, seed=3)
    generator = torch.Generator().manual_seed(5)
    hidden_TH = torch.randn(40, model.hidden_size, generator=generator)
    labels_T = torch.randint(VOCAB_SIZE, (40,), generator=generator)
    labels_T[::7] = IGNORE
    return head, hidden_TH, labels_T


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.3])
def test_loss_and_z_loss_in_float64(z_loss):
    head, hidden_TH, labels_T = _head_and_inputs(z_loss)
    hidden_TH.requires_grad_()
    objective, loss, targets = head((hidden_TH, labels_T, None, None))
    (gradient_TH,) = torch.autograd.grad(objective, hidden_TH)

    exact_TH = hidden_TH.detach().double().requires_grad_()
    logits_TV = exact_TH @ head.output.weight.detach().double()[:VOCAB_SIZE].T
    logsumexp_T = logits_TV.exp().sum(dim=1).log()
    counted_T = labels_T != IGNORE
    picked_T = logits_TV.gather(1, labels_T.clamp(min=0)[:, None]).squeeze(1)
    exact_loss = ((logsumexp_T - picked_T) * counted_T).sum()
    exact_objective = exact_loss + z_loss * (logsumexp_T**2 * counted_T).sum()
    (exact_gradient_TH,) = torch.autograd.grad(exact_objective, exact_TH)

    assert targets.item() == counted_T.sum().item() == 34
    torch.testing.assert_close(loss.double(), exact_loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(objective.detach().double(), exact_objective.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient_TH.double(), exact_gradient_TH, rtol=1e-5, atol=TOLERANCE)
    assert gradient_TH[~counted_T].abs().max() == 0


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa"])  # tied, untied
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_padded_rows_are_masked_and_get_no_gradient(case, z_loss):
    pair = make_pair(replace(CASES[case], z_loss=z_loss))
    model, ours = pair.model, pair.ours(32)
    assert model.padded_vocab_size == 128
    inputs = whole_sequence_inputs(2, 32)
    padded = ours.layers[-1].output.weight[VOCAB_SIZE:]
    with torch.no_grad():
        padded.fill_(7.0)  # whatever stands in a padded row changes nothing
    objective, loss, _ = ours(*inputs)
    objective.backward()
    logits_TV = ours.logits(inputs[0], inputs[2], inputs[3])
    assert torch.isneginf(logits_TV[:, VOCAB_SIZE:]).all()
    assert torch.isfinite(logits_TV[:, :VOCAB_SIZE]).all()
    assert torch.isfinite(loss)
    name = "embedding.tokens.weight" if model.tied_head else "head.weight"
    gradient = gradients_of(ours)[name]
    assert gradient[VOCAB_SIZE:].abs().max() == 0
    assert gradient[:VOCAB_SIZE].abs().max() > 0
