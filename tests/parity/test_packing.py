"""Packed documents against the same documents run one by one; recompute; dropout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.parity.pairs import CASES, VOCAB_SIZE, gradients_of, make_pair, whole_sequence_inputs

TOLERANCE = 1e-5
LENGTH = 40
# Two sequences: the first of three documents, the second of two; one of a single token.
DOCUMENTS = (17, 1, 22, 30, 10)


def _packed():
    starts = [0]
    for size in DOCUMENTS:
        starts.append(starts[-1] + size)
    tokens_T = torch.randint(VOCAB_SIZE, (starts[-1],), generator=torch.Generator().manual_seed(1))
    labels_T = torch.full_like(tokens_T, -100)
    positions_T = torch.cat([torch.arange(size) for size in DOCUMENTS])
    for start, end in zip(starts, starts[1:], strict=False):
        labels_T[start : end - 1] = tokens_T[start + 1 : end]
    bounds = torch.tensor([*starts, *[starts[-1]] * 3], dtype=torch.int32)  # padded with T
    return tokens_T, labels_T, positions_T, bounds, starts


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa"])
def test_packed_documents_are_the_documents_alone(case):
    pair = make_pair(CASES[case])
    tokens_T, labels_T, positions_T, bounds, starts = _packed()
    packed = pair.ours(LENGTH, document_mask=True)
    packed_TV = packed.logits(tokens_T, positions_T, bounds)[:, :VOCAB_SIZE]
    objective, _, _ = packed(tokens_T, labels_T, positions_T, bounds)
    objective.backward()

    total: dict[str, torch.Tensor] = {}
    for start, end in zip(starts, starts[1:], strict=False):
        alone = pair.ours(end - start)
        inputs = (tokens_T[start:end], labels_T[start:end], torch.arange(end - start), torch.tensor([0, end - start]))
        alone_TV = alone.logits(inputs[0], inputs[2], inputs[3])[:, :VOCAB_SIZE]
        torch.testing.assert_close(packed_TV[start:end], alone_TV, atol=TOLERANCE, rtol=0)
        alone(*inputs)[0].backward()
        for name, gradient in gradients_of(alone).items():
            total[name] = total.get(name, 0) + gradient
    for name, gradient in gradients_of(packed).items():
        torch.testing.assert_close(gradient, total[name], atol=TOLERANCE, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_documents_do_see_each_other_without_the_mask():
    pair = make_pair(CASES["llama-gqa"])
    tokens_T, _, positions_T, bounds, _ = _packed()
    apart = pair.ours(LENGTH, document_mask=True).logits(tokens_T, positions_T, bounds)[:, :VOCAB_SIZE]
    together = pair.ours(LENGTH, document_mask=False).logits(tokens_T, positions_T, bounds)[:, :VOCAB_SIZE]
    first = slice(0, DOCUMENTS[0])
    torch.testing.assert_close(apart[first], together[first], atol=TOLERANCE, rtol=0)
    assert (apart[DOCUMENTS[0] :] - together[DOCUMENTS[0] :]).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recompute_gives_the_same_gradients(case, dropout):
    pair = make_pair(replace(CASES[case], dropout=dropout))
    inputs = _packed()[:4]
    found = []
    for recompute in ("none", "full"):
        decoder = pair.ours(LENGTH, document_mask=True, recompute=recompute).train()
        torch.manual_seed(11)  # the same dropout: recompute must draw it again
        objective, _, _ = decoder(*inputs)
        objective.backward()
        found.append((objective.detach(), gradients_of(decoder)))
    (kept_objective, kept), (again_objective, again) = found
    assert torch.equal(kept_objective, again_objective)
    for name in kept:
        assert torch.equal(kept[name], again[name]), name


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa"])
def test_dropout_only_in_training(case):
    decoder = make_pair(replace(CASES[case], dropout=0.5)).ours(LENGTH)
    plain = make_pair(CASES[case]).ours(LENGTH)
    inputs = whole_sequence_inputs(2, LENGTH)
    with torch.no_grad():
        assert torch.equal(decoder.eval()(*inputs)[1], plain(*inputs)[1])
        decoder.train()
        first, second = decoder(*inputs)[1], decoder(*inputs)[1]
    assert not torch.equal(first, second)
