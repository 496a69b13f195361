"""Decoding over the key-value cache against the whole sequence at once, logits at every position; and against HF's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conf.errors import UserError
from tests.dist import run_ranks
from tests.parity.custom import LIMIT, make_custom_pair
from tests.parity.pairs import CASES, make_pair, whole_sequence_inputs
from train.inference.cached import CachedDecoder
from train.inference.load import assemble_decoder
from train.model.blueprint import Blueprint
from train.model.transformer import Reading
from train.parallel import split_ranks

TOLERANCE = 1e-5
SEQUENCES, LENGTH = 2, 120
# With longrope a context that grows beyond its first length is run anew, which has tests of its own.
GROWING = [name for name, model in CASES.items() if model.rope.scaling != "longrope"]


@pytest.mark.parametrize("case", GROWING)
@pytest.mark.parametrize("prefill", [(1,), (97,), (40, 33)], ids=str)
def test_cached_logits_at_every_position(case, prefill):
    _compare_cached(make_pair(CASES[case]), prefill, LENGTH)


@pytest.mark.parametrize("case", ["yarn", "olmo2", "geglu-exact"])
@pytest.mark.parametrize("prefill", [(1,), (40, 33)], ids=str)
def test_cached_logits_of_what_no_family_has(case, prefill):
    _compare_cached(make_custom_pair(case), prefill, LENGTH)


MADE = {"custom": lambda: make_custom_pair("longrope"), "phi3": lambda: make_pair(CASES["phi3"])}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
@pytest.mark.parametrize(("prefill", "length"), [((1,), LIMIT), ((40, 20), LIMIT), ((LIMIT + 1,), LENGTH), ((97,), LENGTH)])
def test_cached_logits_of_longrope_on_either_side_of_its_limit(make, prefill, length):
    pair = make()
    assert pair.model.rope.original_max_positions == LIMIT
    _compare_cached(pair, prefill, length)


def _compare_cached(pair, prefill, length):
    """Logits at every position of a context run in pieces, then token by token, are those of it run whole."""
    model = pair.model
    tokens_T, _, positions_T, bounds = whole_sequence_inputs(SEQUENCES, length, vocab_size=model.vocab_size)
    decoder = pair.ours(length)
    with torch.no_grad():
        whole_BSV = decoder.logits(tokens_T, positions_T, bounds).view(SEQUENCES, length, -1)
    cached = CachedDecoder(decoder, model)
    cache = cached.new_cache(num_sequences=SEQUENCES, capacity=length)
    sizes = [*prefill, *[1] * (length - sum(prefill))]
    pieces = tokens_T.view(SEQUENCES, length).split(sizes, dim=1)
    logits_BSV = torch.cat([cached.logits(cached.advance(piece, cache)) for piece in pieces], dim=1)
    assert cache.length == length
    vocab = model.vocab_size
    torch.testing.assert_close(logits_BSV[..., :vocab], whole_BSV[..., :vocab], atol=TOLERANCE, rtol=0)
    with torch.no_grad():
        theirs_BSV = pair.theirs(input_ids=tokens_T.view(SEQUENCES, length)).logits
    torch.testing.assert_close(logits_BSV[..., :vocab], theirs_BSV, atol=TOLERANCE, rtol=0)


WINDOWED = {
    "window": {"window": 7},
    "window-on-some-layers": {"window": 7, "window_pattern": "SL"},
    "softcap-and-scale": {"attention_softcap": 2.0, "attention_scale": 0.4},
    "all": {"window": 33, "window_pattern": "LS", "attention_softcap": 2.0, "attention_scale": 0.4},
}


@pytest.mark.parametrize("changes", WINDOWED.values(), ids=WINDOWED)
@pytest.mark.parametrize("prefill", [(1,), (40, 33)], ids=str)
def test_cached_logits_with_a_window_and_a_softcap(changes, prefill):
    pair = make_pair(CASES["llama-gqa"])
    model = replace(pair.model, family="custom", **changes)
    tokens_T, _, positions_T, bounds = whole_sequence_inputs(SEQUENCES, LENGTH, vocab_size=model.vocab_size)
    decoder = replace(pair, model=model).ours(LENGTH)
    with torch.no_grad():
        whole_BSV = decoder.logits(tokens_T, positions_T, bounds).view(SEQUENCES, LENGTH, -1)
        plain_BSV = pair.ours(LENGTH).logits(tokens_T, positions_T, bounds).view(SEQUENCES, LENGTH, -1)
    cached = CachedDecoder(decoder, model)
    cache = cached.new_cache(num_sequences=SEQUENCES, capacity=LENGTH)
    pieces = tokens_T.view(SEQUENCES, LENGTH).split([*prefill, *[1] * (LENGTH - sum(prefill))], dim=1)
    logits_BSV = torch.cat([cached.logits(cached.advance(piece, cache)) for piece in pieces], dim=1)
    vocab = model.vocab_size
    torch.testing.assert_close(logits_BSV[..., :vocab], whole_BSV[..., :vocab], atol=TOLERANCE, rtol=0)
    assert (whole_BSV - plain_BSV)[..., :vocab].abs().max() > 1e-2  # and it does make a difference


def test_a_repeated_cache_continues_apart():
    pair = make_pair(CASES["llama-gqa"])
    cached = CachedDecoder(pair.ours(LENGTH), pair.model)
    single = cached.new_cache(num_sequences=1, capacity=30)
    prompt_BS = torch.arange(20).unsqueeze(0)
    cached.advance(prompt_BS, single)
    both = single.select(torch.tensor([0, 0]))
    next_BS = torch.tensor([[3], [9]])
    together = cached.logits(cached.advance(next_BS, both))
    for row in range(2):
        fresh = cached.new_cache(num_sequences=1, capacity=30)
        cached.advance(prompt_BS, fresh)
        alone = cached.logits(cached.advance(next_BS[row : row + 1], fresh))
        vocab = pair.model.vocab_size
        torch.testing.assert_close(together[row, :, :vocab], alone[0, :, :vocab], atol=TOLERANCE, rtol=0)
    assert single.length == 20 and both.length == 21


def test_no_context_beyond_the_models():
    pair = make_pair(CASES["gpt2"])
    cached = CachedDecoder(pair.ours(LENGTH), pair.model)
    with pytest.raises(UserError, match="model.max_positions=160"):
        cached.new_cache(num_sequences=1, capacity=161)


EVEN = {
    "gpt2": lambda: make_pair(replace(CASES["gpt2"], num_heads=2)),
    "llama": lambda: make_pair(CASES["llama-tied-llama3"]),
    "gemma3": lambda: make_pair(CASES["gemma3"]),  # of the logits the cap too, and of heads the norms
    "olmo2": lambda: make_custom_pair("olmo2"),
}


def _on_tensor_ranks(context, case):
    """Logits of a prompt run through the cache in two pieces, on one of the ranks that share the model."""
    pair = EVEN[case]()
    tensor = split_ranks(context, tensor_parallel=context.world_size).tensor
    weights = {name: parameter.detach() for name, parameter in pair.named_weights().items()}
    decoder = assemble_decoder(
        Blueprint(model=pair.model, tensor=tensor),
        lambda name: pair.keymap.to_logical(name, weights.__getitem__),
        reading=Reading(sequence_length=LENGTH, document_mask=False),
    )
    cached = CachedDecoder(decoder, pair.model)
    cache = cached.new_cache(num_sequences=1, capacity=40)
    tokens_1S = torch.arange(40).unsqueeze(0)
    pieces = [cached.logits(cached.advance(piece, cache)) for piece in tokens_1S.split([30, 10], dim=1)]
    with torch.no_grad():
        theirs = pair.theirs(input_ids=tokens_1S).logits
    return torch.cat(pieces, dim=1)[..., : pair.model.vocab_size], theirs


@pytest.mark.further
@pytest.mark.parametrize("case", EVEN)
def test_tensor_ranks_decode_as_hugging_face_does(case):
    for ours_1SV, theirs_1SV in run_ranks(_on_tensor_ranks, 2, case):
        torch.testing.assert_close(ours_1SV, theirs_1SV, atol=TOLERANCE, rtol=0)
