"""Logits, loss and every gradient of our decoder against the classes of Hugging Face, fp32."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from tests.parity.pairs import CASES, VOCAB_SIZE, gradients_of, make_pair, whole_sequence_inputs
from train.convert.hf_config import SpecialIds, model_config

TOLERANCE = 1e-5
SEQUENCES, LENGTH = 2, 150  # beyond position 100, and beyond the 64 that the stretched rope was made for


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients(case):
    pair = make_pair(CASES[case])
    vocab = pair.model.vocab_size
    tokens_T, labels_T, positions_T, bounds = whole_sequence_inputs(SEQUENCES, LENGTH, vocab_size=vocab)
    ours = pair.ours(LENGTH)

    theirs_TV = pair.theirs(input_ids=tokens_T.view(SEQUENCES, LENGTH)).logits.flatten(0, 1)
    ours_TV = ours.logits(tokens_T, positions_T, bounds)
    torch.testing.assert_close(ours_TV[:, :vocab], theirs_TV, atol=TOLERANCE, rtol=0)

    their_loss = F.cross_entropy(theirs_TV, labels_T)
    objective, loss, targets = ours(tokens_T, labels_T, positions_T, bounds)
    assert targets.item() == SEQUENCES * (LENGTH - 1)
    torch.testing.assert_close(loss / targets, their_loss.detach(), atol=TOLERANCE, rtol=0)

    their_loss.backward()
    (objective / targets).backward()
    their_gradients, our_gradients = pair.their_gradients(), gradients_of(ours)
    assert their_gradients.keys() == our_gradients.keys()
    for name, gradient in our_gradients.items():
        largest = gradient.abs().max().item()
        assert largest > 0, name
        # Gradients of a mean are small: also within 1e-4 of the tensor's largest.
        allowed = min(TOLERANCE, 1e-4 * largest)
        torch.testing.assert_close(
            gradient, their_gradients[name], atol=allowed, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", CASES)
def test_the_exported_configuration_means_the_same_model(case):
    """config.json as we write it, read by transformers, computes to the bit what the one written by hand does."""
    pair = make_pair(CASES[case])
    content = json.loads(json.dumps(model_config(pair.model, SpecialIds(bos=None, eos=None), "fp32")))
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    exported = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert [type(exported).__name__] == config.architectures == [type(pair.theirs).__name__]
    exported.load_state_dict(pair.theirs.state_dict())
    tokens_BS = whole_sequence_inputs(SEQUENCES, LENGTH, vocab_size=pair.model.vocab_size)[0].view(SEQUENCES, LENGTH)
    with torch.no_grad():
        assert torch.equal(exported(input_ids=tokens_BS).logits, pair.theirs(input_ids=tokens_BS).logits)


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa"])
def test_hugging_faces_own_loss_agrees(case):
    """The shift of the labels is ours: their model, given the tokens as labels, must find the same loss."""
    pair = make_pair(CASES[case])
    tokens_T, labels_T, positions_T, bounds = whole_sequence_inputs(SEQUENCES, LENGTH)
    tokens_BS = tokens_T.view(SEQUENCES, LENGTH)
    their_loss = pair.theirs(input_ids=tokens_BS, labels=tokens_BS).loss
    _, loss, targets = pair.ours(LENGTH)(tokens_T, labels_T, positions_T, bounds)
    torch.testing.assert_close(loss / targets, their_loss, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("window", [1, 7, 64])
def test_a_sliding_window_is_mistrals(window):
    """The query itself counts."""
    pair = make_pair(replace(CASES["mistral"], window=window))
    tokens_T, _, positions_T, bounds = whole_sequence_inputs(SEQUENCES, LENGTH)
    with torch.no_grad():
        theirs_TV = pair.theirs(input_ids=tokens_T.view(SEQUENCES, LENGTH)).logits.flatten(0, 1)
        ours_TV = pair.ours(LENGTH).logits(tokens_T, positions_T, bounds)[:, :VOCAB_SIZE]
        without = replace(pair, model=replace(pair.model, window=None))
        without_TV = without.ours(LENGTH).logits(tokens_T, positions_T, bounds)[:, :VOCAB_SIZE]
    torch.testing.assert_close(ours_TV, theirs_TV, atol=TOLERANCE, rtol=0)
    assert (without_TV - theirs_TV).abs().max() > 1e-2


def _swap_query_heads(weights, model):
    name = "blocks.0.attention.qkv.weight"
    weights[name] = weights[name].clone()
    weights[name][0, [0, 1]] = weights[name][0, [1, 0]]


def _swap_gate_and_up(weights, model):
    weights["blocks.1.mlp.gate_up.weight"] = weights["blocks.1.mlp.gate_up.weight"].flip(0)


def _transpose_output(weights, model):
    weights["blocks.0.attention.output.weight"] = weights["blocks.0.attention.output.weight"].T.contiguous()


def _shift_vocabulary(weights, model):
    weights["embedding.tokens.weight"] = weights["embedding.tokens.weight"].roll(1, dims=0)


@pytest.mark.parametrize("fault", [_swap_query_heads, _swap_gate_and_up, _transpose_output, _shift_vocabulary])
def test_a_fault_is_far_outside_the_tolerance(fault):
    """The comparison above can fail: each fault moves the logits by far more than it allows."""
    pair = make_pair(CASES["llama-gqa"])
    tokens_T, _, positions_T, bounds = whole_sequence_inputs(SEQUENCES, LENGTH)
    ours = pair.ours(LENGTH)
    parameters = {parameter.logical.name: parameter for parameter in ours.parameters()}
    weights = {name: p.detach().view(p.logical.shape) for name, p in parameters.items()}
    fault(weights, pair.model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name].clone().view_as(parameter))
        theirs_TV = pair.theirs(input_ids=tokens_T.view(SEQUENCES, LENGTH)).logits.flatten(0, 1)
        ours_TV = ours.logits(tokens_T, positions_T, bounds)
    assert (ours_TV[:, : pair.model.vocab_size] - theirs_TV).abs().max() > 100 * TOLERANCE
