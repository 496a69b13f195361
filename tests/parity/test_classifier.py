"""The labels of many rows, in batches and on several ranks, against transformers, one row at a time."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.errors import UserError
from tests.dist import run_ranks
from tests.distributed import uneven
from tests.parity.pairs import CASES, Pair, make_pair
from train.config.model import ModelConfig
from train.inference.classify import Classifier
from train.inference.likelihood import LikelihoodScorer
from train.inference.load import assemble_decoder
from train.model.blueprint import Blueprint
from train.model.transformer import Decoder, Reading
from train.parallel import ParallelContext, single_process, split_ranks

LABELS = ("no", "maybe", "yes")
TOLERANCE = 1e-5


def with_labels(case: str) -> ModelConfig:
    return replace(CASES[case], labels=LABELS)


def some_rows(model: ModelConfig, count: int = 23) -> list[list[int]]:
    """Rows of all lengths, among them the shortest and the longest that the model reads."""
    draw = random.Random(0)
    lengths = [1, model.max_positions, *(draw.randrange(1, model.max_positions) for _ in range(count - 2))]
    draw.shuffle(lengths)
    return [[draw.randrange(model.vocab_size) for _ in range(length)] for length in lengths]


@torch.no_grad()
def their_scores(pair: Pair, rows: list[list[int]]) -> torch.Tensor:
    """Log-probabilities by transformers, each row alone and without padding."""
    logits = [pair.theirs(input_ids=torch.tensor([row]), use_cache=False).logits for row in rows]
    return torch.cat(logits).log_softmax(dim=-1)


def classifier_of(decoder: Decoder, model: ModelConfig, batch_tokens: int = 700) -> Classifier:
    return Classifier(decoder, model, context=single_process(), batch_tokens=batch_tokens)


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_transformers_whatever_the_batches(case: str) -> None:
    pair = make_pair(with_labels(case))
    rows, decoder = some_rows(pair.model), pair.ours(160)
    expected = their_scores(pair, rows)
    for batch_tokens in (1, 700, 100_000):
        found = classifier_of(decoder, pair.model, batch_tokens).classify(rows)
        torch.testing.assert_close(torch.tensor(found), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.filterwarnings("error")
def test_rows_may_lie_in_a_file(tmp_path: Path) -> None:
    pair = make_pair(with_labels("gpt2"))
    rows, classifier = some_rows(pair.model), classifier_of(pair.ours(160), pair.model)
    np.save(tmp_path / "tokens.npy", np.array([token for row in rows for token in row], dtype=np.int32))
    tokens_N = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    arrays = np.split(tokens_N, np.cumsum([len(row) for row in rows])[:-1])
    assert classifier.classify(arrays) == classifier.classify(rows)


def test_progress_counts_every_row() -> None:
    pair, told = make_pair(with_labels("gpt2")), []
    classifier = classifier_of(pair.ours(160), pair.model)
    assert len(classifier.classify(some_rows(pair.model), progress=told.append)) == sum(told) == 23 and len(told) > 1
    assert classifier.classify([]) == []


@pytest.mark.parametrize(
    ("row", "words"),
    [([], "has no token"), ([1] * 161, "161 tokens, the model reads 160"), ([101], "beyond"), ([-1], "beyond the model's")],
)
def test_rows_that_cannot_be_read(row: list[int], words: str) -> None:
    pair = make_pair(with_labels("gpt2"))
    with pytest.raises(ValueError, match=f"row 1: .*{words}"):
        classifier_of(pair.ours(160), pair.model).classify([[1, 2], row])


def test_scores_that_are_not_finite_are_an_error() -> None:
    pair = make_pair(with_labels("gpt2"))
    with torch.no_grad():
        pair.theirs.score.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        classifier_of(pair.ours(160), pair.model).classify([[1, 2]])


def test_each_kind_of_model_has_its_own_reader() -> None:
    labelled, language = make_pair(with_labels("gpt2")), make_pair(CASES["gpt2"])
    with pytest.raises(UserError, match=r"model\.labels is empty"):
        classifier_of(language.ours(160), language.model)
    with pytest.raises(UserError, match=r"model\.labels=\['no', 'maybe', 'yes'\]: this model tells labels apart"):
        LikelihoodScorer(labelled.ours(160), labelled.model, context=single_process(), batch_tokens=10)


def test_a_decoder_that_trains_is_left_as_it_was() -> None:
    pair = make_pair(replace(with_labels("gpt2"), dropout=0.5))
    rows, decoder = some_rows(pair.model), pair.ours(64, document_mask=True).train()
    expected = their_scores(pair, rows)
    found = classifier_of(decoder, pair.model).classify(rows)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert decoder.training and decoder.reading == Reading(sequence_length=64, document_mask=True)
    assert not decoder.layers[-1]._forward_pre_hooks


# --- ranks


def _on_ranks(context: ParallelContext, case: str, tensor: int) -> list[list[float]]:
    context = split_ranks(context, tensor_parallel=tensor)
    pair = make_pair(with_labels(case))
    weights = {name: value.detach() for name, value in pair.named_weights().items()}
    decoder = assemble_decoder(
        Blueprint(model=pair.model, tensor=context.tensor),
        lambda name: pair.keymap.to_logical(name, weights.__getitem__),
        reading=Reading(sequence_length=160, document_mask=False),
    )
    return Classifier(decoder, pair.model, context=context, batch_tokens=700).classify(some_rows(pair.model))


@pytest.mark.further
@pytest.mark.parametrize(("ranks", "tensor"), [(2, 1), (3, 1), (4, 2)])
def test_ranks_give_the_numbers_of_transformers(ranks: int, tensor: int) -> None:
    case = "qwen2"  # two key-value heads
    pair = make_pair(with_labels(case))
    expected = their_scores(pair, some_rows(pair.model))
    for found in run_ranks(_on_ranks, ranks, case, tensor):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=TOLERANCE, atol=TOLERANCE)


def _different_rows(context: ParallelContext) -> None:
    pair = make_pair(with_labels("gpt2"))
    Classifier(pair.ours(160), pair.model, context=context, batch_tokens=700).classify([[context.rank]])


@pytest.mark.further
def test_ranks_that_ask_for_different_rows_are_an_error() -> None:
    with pytest.raises(AssertionError, match="different rows"):
        run_ranks(_different_rows, 2)


def _of_the_live_model(context: ParallelContext, zero: int, tensor: int, rows: bool) -> tuple[list, list]:
    """The losses of some steps, and the scores after them; looking at the model in between must change no loss."""
    context = split_ranks(context, tensor_parallel=tensor, sequence_parallel=rows)
    model = uneven.TINY_LABELS
    texts = some_rows(model, 7)
    longest = next(number for number, text in enumerate(texts) if len(text) == model.max_positions)
    curves, found, asked = [], [], []
    for looks in (True, False):
        engine = uneven.make_engine(context, zero=zero, precision="fp32", model=model)
        classifier = Classifier(engine.module, model, context=context, batch_tokens=40)
        curve = []
        for step in range(3):
            batches = uneven.batches_of_step(step, context, len(LABELS))
            curve.append(engine.train_step(batches, lr=uneven.LR, step=step).loss)
            engine.evaluate(batches[0])
            if looks:
                found = classifier.classify(texts)
                assert engine.probe().shape == (4, len(LABELS))
                options = torch.arange(len(LABELS))[None]
                place_P = torch.tensor([model.max_positions - 1])
                answers = engine.ask(torch.tensor([texts[longest]]), place_P, options)
                assert answers.likeliest.tolist() == [int(torch.tensor(found[longest]).argmax())]
                asked = answers.log_probability.tolist()
        curves.append(curve)
    assert curves[0] == curves[1], "looking at the model must change nothing"
    assert asked[0] == pytest.approx(found[longest], abs=TOLERANCE)
    return curves[0], found


@pytest.mark.further
@pytest.mark.parametrize(
    ("ranks", "zero", "tensor", "rows"), [(2, 1, 1, False), (2, 3, 1, False), (2, 1, 2, True), (4, 3, 2, True)]
)
def test_the_live_model_is_read_under_every_layout(ranks: int, zero: int, tensor: int, rows: bool) -> None:
    expected_curve, expected = run_ranks(_of_the_live_model, 1, 1, 1, False)[0]
    for curve, found in run_ranks(_of_the_live_model, ranks, zero, tensor, rows):
        assert curve == pytest.approx(expected_curve, abs=1e-5)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)
