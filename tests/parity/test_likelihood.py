"""Log-likelihoods and greedy continuations of many requests against transformers, one request at a time and without a cache."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from conf.errors import UserError
from tests.dist import run_ranks
from tests.parity.pairs import CASES, VOCAB_SIZE, Pair, make_pair
from train.config.model import ModelConfig
from train.inference.batched import BatchGenerator, Prompt
from train.inference.generation import Continuation
from train.inference.likelihood import LEAST_SHARED, LikelihoodRequest, LikelihoodScorer
from train.inference.load import assemble_decoder
from train.inference.sampling import Sampling
from train.model.blueprint import Blueprint
from train.model.transformer import Decoder, Reading
from train.parallel import ParallelContext, single_process, split_ranks

SELDOM = pytest.mark.campaign(name="layouts")

TOLERANCE = 1e-4
SHARED = 2 * LEAST_SHARED


def some_requests(model: ModelConfig, *, seed: int = 0) -> list[LikelihoodRequest]:
    """Lengths of all kinds: up to the last position, one token on either side, several behind one context, a common start."""
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draw.randrange(model.vocab_size) for _ in range(count)]

    opening = ids(SHARED)
    requests = []
    for number in range(24):
        context = (opening if number % 3 else []) + ids(draw.randrange(1, 90))
        for _ in range(draw.choice([1, 1, 4])):
            requests.append(LikelihoodRequest(context=context, continuation=ids(draw.choice([1, 1, 3, 7]))))
    requests.append(LikelihoodRequest(context=ids(1), continuation=ids(model.max_positions)))
    requests.append(LikelihoodRequest(context=ids(model.max_positions), continuation=ids(1)))
    requests.append(LikelihoodRequest(context=ids(1), continuation=ids(1)))
    draw.shuffle(requests)
    return requests


@torch.no_grad()
def their_likelihoods(pair: Pair, requests: list[LikelihoodRequest]) -> list[tuple[float, bool]]:
    """(loss, is greedy) of each request by transformers, run alone."""
    found = []
    for request in requests:
        ids = torch.tensor([[*request.context, *request.continuation]])
        targets = ids[0, -len(request.continuation) :]
        logits = pair.theirs(input_ids=ids[:, :-1], use_cache=False).logits[0, -len(targets) :].double()
        loss = F.cross_entropy(logits, targets, reduction="sum").item()
        found.append((loss, bool((logits.argmax(dim=-1) == targets).all())))
    return found


def scorer_of(decoder: Decoder, model: ModelConfig, context: ParallelContext | None = None, **more: int) -> LikelihoodScorer:
    return LikelihoodScorer(decoder, model, context=context or single_process(), **{"batch_tokens": 600} | more)


def greedy_ending(pair: Pair, context: list[int]) -> LikelihoodRequest:
    """A request whose continuation is what greedy decoding gives."""
    ids = list(context)
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(pair.theirs(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return LikelihoodRequest(context=context, continuation=ids[len(context) :])


@pytest.mark.parametrize("case", CASES)
def test_likelihoods_are_those_of_transformers(case):
    pair = make_pair(CASES[case])
    requests = some_requests(pair.model)
    requests += [greedy_ending(pair, list(requests[0].context)[:40]), greedy_ending(pair, [3, 4, 5])]
    found = scorer_of(pair.ours(pair.model.max_positions), pair.model).score(requests)
    expected = their_likelihoods(pair, requests)
    assert [one.loss for one in found] == pytest.approx([loss for loss, _ in expected], rel=TOLERANCE)
    assert [one.is_greedy for one in found] == [is_greedy for _, is_greedy in expected]
    assert [one.is_greedy for one in found][-2:] == [True, True]


def test_results_do_not_depend_on_the_batches():
    pair = make_pair(CASES["llama-gqa"])
    requests, decoder = some_requests(pair.model), pair.ours(160)
    small, large = (scorer_of(decoder, pair.model, batch_tokens=size).score(requests) for size in (1, 20_000))
    assert [one.loss for one in small] == pytest.approx([one.loss for one in large], rel=1e-6)


def test_what_is_shared_runs_once():
    pair = make_pair(CASES["llama-gqa"])
    context, other = list(range(100)), list(range(99, 0, -1))
    choices = [LikelihoodRequest(context=context, continuation=[number, 1, 2]) for number in range(5)]
    scorer = scorer_of(pair.ours(160), pair.model)
    scorer.score(choices)
    assert scorer.tokens_run == len(context) + 5 * 2, "the context once, then of each continuation all but the last token"
    scorer = scorer_of(pair.ours(160), pair.model)
    scorer.score([LikelihoodRequest(context=context, continuation=[number]) for number in range(5)])
    assert scorer.tokens_run == len(context), "one token each needs no second run"
    scorer = scorer_of(pair.ours(160), pair.model)
    scorer.score([LikelihoodRequest(context=[*other, number, 7], continuation=[1]) for number in range(5)])
    assert scorer.tokens_run == len(other) + 5 * 2, "contexts that begin alike run that once"


def test_progress_counts_every_request():
    pair = make_pair(CASES["gpt2"])
    requests, told = some_requests(pair.model), []
    scorer_of(pair.ours(160), pair.model).score(requests, progress=told.append)
    assert sum(told) == len(requests) and len(told) > 1
    assert scorer_of(pair.ours(160), pair.model).score([]) == []


@pytest.mark.parametrize(
    ("context", "continuation", "words"),
    [((), (1,), "at least one token of context"), ((1,), (), "one of continuation"), ((1,) * 160, (1, 1), "161 tokens")],
)
def test_requests_that_cannot_be_scored(context, continuation, words):
    pair = make_pair(CASES["gpt2"])
    good = LikelihoodRequest(context=(1, 2), continuation=(3,))
    with pytest.raises(ValueError, match=f"request 1: .*{words}"):
        scorer_of(pair.ours(160), pair.model).score([good, LikelihoodRequest(context=context, continuation=continuation)])


# --- ranks


def _on_ranks(context: ParallelContext, case: str, tensor: int) -> list[tuple[float, bool]]:
    context = split_ranks(context, tensor_parallel=tensor)
    pair = make_pair(CASES[case])
    weights = {name: value.detach() for name, value in pair.named_weights().items()}
    decoder = assemble_decoder(
        Blueprint(model=pair.model, tensor=context.tensor),
        lambda name: pair.keymap.to_logical(name, weights.__getitem__),
        reading=Reading(sequence_length=160, document_mask=False),
    )
    found = scorer_of(decoder, pair.model, context).score(some_requests(pair.model))
    ids = _generator(decoder, pair.model, context).generate(some_prompts(), watch)
    return [(one.loss, one.is_greedy) for one in found], ids


@pytest.mark.further
@pytest.mark.parametrize(
    ("ranks", "tensor"), [(3, 1), (2, 2), *(pytest.param(*sizes, marks=SELDOM) for sizes in [(2, 1), (4, 2)])]
)
def test_ranks_give_the_numbers_of_one_process(ranks, tensor):
    """The last round of batches is uneven: three ranks share a number of batches that three does not divide."""
    case = "qwen2"  # two key-value heads
    pair = make_pair(CASES[case])
    decoder = pair.ours(160)
    scorer = scorer_of(decoder, pair.model)
    requests = some_requests(pair.model)
    assert len(scorer._batches(scorer._units(requests))) % 3
    expected = scorer.score(requests)
    expected_ids = _generator(decoder, pair.model).generate(some_prompts(), watch)
    for found, ids in run_ranks(_on_ranks, ranks, case, tensor):
        assert [loss for loss, _ in found] == pytest.approx([one.loss for one in expected], rel=1e-5)
        assert [greedy for _, greedy in found] == [one.is_greedy for one in expected]
        assert ids == expected_ids


# --- continuations


class Letters:
    """Stands in for a tokenizer's stream: an id is a letter."""

    def push(self, token_id: int) -> str:
        return chr(ord("a") + token_id % 26)


def watch(number: int) -> Continuation:
    return Continuation(Letters(), stop=["zz"], ends=[7])


def some_prompts(seed: int = 1) -> list[Prompt]:
    draw = random.Random(seed)
    return [
        Prompt(
            ids=tuple(draw.randrange(VOCAB_SIZE) for _ in range(draw.randrange(1, 100))),
            max_new_tokens=draw.choice([1, 5, 30, 60]),
        )
        for _ in range(11)
    ]


def _generator(decoder: Decoder, model: ModelConfig, context: ParallelContext | None = None) -> BatchGenerator:
    return BatchGenerator(decoder, model, context=context or single_process(), batch_tokens=400, num_known_ids=VOCAB_SIZE)


def _regrets(pair: Pair, prompt: Prompt, ids: list[int]) -> list[float]:
    """How much lower the logit of each id is than the highest in its place, by transformers without a cache."""
    whole = [*prompt.ids, *ids[:-1]]
    limit = pair.model.rope.original_max_positions if pair.model.rope.scaling == "longrope" else 0
    cuts = [len(whole), limit] if len(prompt.ids) < limit < len(whole) else [len(whole)]  # the longer is rotated otherwise
    with torch.no_grad():
        logits = [pair.theirs(input_ids=torch.tensor([whole[:cut]]), use_cache=False).logits[0] for cut in cuts]
    regrets = []
    for place, token_id in enumerate(ids, start=len(prompt.ids) - 1):
        known = logits[-1 if place < cuts[-1] else 0][place, :VOCAB_SIZE]
        regrets.append(float(known.max() - known[token_id]))
    return regrets


# One of each kind of attention and positions; the others differ in what both ways of running share.
GREEDY = ("gpt2", "llama-gqa", "mistral", "gemma2", "gpt-neox", "phi3")


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in GREEDY else SELDOM) for case in CASES])
def test_greedy_continuations_are_those_of_transformers(case):
    pair = make_pair(CASES[case])
    prompts = some_prompts()
    prompts.append(Prompt(ids=(5,) * 120, max_new_tokens=41))  # to the last position that the model reads
    found = _generator(pair.ours(160), pair.model).generate(prompts, watch)
    for prompt, ids in zip(prompts, found, strict=True):
        assert max(_regrets(pair, prompt, ids)) < TOLERANCE, "each is the likeliest, or as likely but for rounding"
        text = "".join(map(Letters().push, ids))
        ended = ids[-1] == 7 or "zz" in text
        assert ended or len(ids) == prompt.max_new_tokens, "it ends at the limit, at the end of a document, or at a stop"
        assert 7 not in ids[:-1] and "zz" not in text[:-1]


def test_draws_depend_on_seed_and_place_alone():
    pair = make_pair(CASES["llama-gqa"])
    decoder = pair.ours(160)
    sampling = Sampling(temperature=1.0, top_k=20)
    prompts = [Prompt(ids=one.ids, max_new_tokens=12, sampling=sampling, seed=3) for one in some_prompts()]
    together = _generator(decoder, pair.model).generate(prompts, watch)
    alone = BatchGenerator(decoder, pair.model, context=single_process(), batch_tokens=1).generate(prompts, watch)
    assert together == alone and len({tuple(ids) for ids in together}) > 5
    mixed = [prompts[0], Prompt(ids=prompts[1].ids, max_new_tokens=12), *prompts[2:]]
    assert _generator(decoder, pair.model).generate(mixed, watch)[2:] == together[2:]


@pytest.mark.parametrize("prompt", [Prompt(ids=(), max_new_tokens=3), Prompt(ids=(1,) * 150, max_new_tokens=12)])
def test_prompts_that_cannot_be_continued(prompt):
    pair = make_pair(CASES["gpt2"])
    with pytest.raises(UserError, match="prompt 0: .*max_positions=160"):
        _generator(pair.ours(160), pair.model).generate([prompt], watch)


def test_logits_that_are_not_finite_are_told():
    pair = make_pair(CASES["gpt2"])
    decoder = pair.ours(160)
    with torch.no_grad():
        decoder.layers[0].tokens.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        _generator(decoder, pair.model).generate([Prompt(ids=(1, 2), max_new_tokens=3)], watch)
