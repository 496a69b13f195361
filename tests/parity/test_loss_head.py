"""The loss head against float64 formulas; the padded vocabulary takes no part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.dist import run_ranks
from tests.models import initialised
from tests.parity.pairs import CASES, VOCAB_SIZE, gradients_of, make_pair, whole_sequence_inputs
from train.config.kernels import KernelsConfig
from train.model.blueprint import Blueprint
from train.model.heads import IGNORE, LossHead
from train.parallel import ALONE, TensorRanks, split_ranks

TOLERANCE = 1e-5


def _head_and_inputs(z_loss: float):
    model = replace(CASES["llama-gqa"], z_loss=z_loss, init_std=0.1)
    head = initialised(LossHead(Blueprint(model=model)), model, seed=3)
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


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator makes while this is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else (result,)
        self.elements = max([self.elements, *(each.numel() for each in made if isinstance(each, torch.Tensor))])
        return result


def _chunked_and_plain(tensor: TensorRanks, z_loss: float) -> list[tuple]:
    """(objective, loss, gradient of the hidden states, of the matrix, largest tensor) in chunks of 16 tokens, and plain."""
    model = replace(CASES["llama-gqa"], z_loss=z_loss, init_std=0.1, vocab_multiple=256)  # a rank of padding only
    generator = torch.Generator().manual_seed(5)
    tokens = 200
    hidden_TH = torch.randn(tokens, model.hidden_size, generator=generator)
    labels_T = torch.randint(VOCAB_SIZE, (tokens,), generator=generator)
    labels_T[::7] = IGNORE
    found = []
    for logits_bytes in (16 * 4 * model.padded_vocab_size // tensor.size, 1 << 30):
        kernels = KernelsConfig(logits_bytes=logits_bytes)
        head = initialised(LossHead(Blueprint(model=model, kernels=kernels, tensor=tensor)), model, seed=3)
        inputs_TH = hidden_TH.clone().requires_grad_()
        with LargestTensor() as largest:
            objective, loss, _ = head((inputs_TH, labels_T, None, None))
            (objective / 7).backward()
        found.append((objective.detach(), loss, inputs_TH.grad, head.output.weight.grad, largest.elements))
        with torch.no_grad():
            torch.testing.assert_close(head((inputs_TH, labels_T, None, None))[0], objective.detach(), rtol=1e-6, atol=0)
    assert found[0][-1] < tokens * model.padded_vocab_size // tensor.size <= found[1][-1]
    return found


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_chunks_give_the_plain_loss_without_the_whole_logits(z_loss):
    chunked, plain = _chunked_and_plain(ALONE, z_loss)
    for in_chunks, at_once in zip(chunked[:-1], plain[:-1], strict=True):
        torch.testing.assert_close(in_chunks, at_once, rtol=1e-6, atol=1e-6)


def _on_tensor_ranks(context, z_loss):
    tensor = split_ranks(context, tensor_parallel=context.world_size).tensor
    return [(*parts[:3], parts[3].numpy(), parts[4]) for parts in _chunked_and_plain(tensor, z_loss)]


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_two_ranks_of_the_vocabulary_give_the_loss_of_one(z_loss):
    _, alone = _chunked_and_plain(ALONE, z_loss)
    ranks = run_ranks(_on_tensor_ranks, 2, z_loss)
    for way in (0, 1):
        for place in range(3):
            for rank in ranks:
                torch.testing.assert_close(rank[way][place], alone[place], rtol=1e-6, atol=2e-6)
        weight_VH = torch.cat([torch.as_tensor(rank[way][3]) for rank in ranks])
        torch.testing.assert_close(weight_VH, alone[3], rtol=1e-6, atol=2e-6)
