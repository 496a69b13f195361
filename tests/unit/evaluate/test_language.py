"""Windows against their definition and lm-eval's; what counts as an example; the loss of whole documents."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from conf.errors import UserError
from data_pipeline.task_config import TaskConfig
from data_pipeline.texts import TextSource, TokenRun
from tests.unit.convert.checkpoints import GPT2, LLAMA
from tests.unit.evaluate.subjects import engines_of, subject_in
from train.evaluate.language import BLOCK_TARGETS, FEW_DOCUMENTS, Reach, cut_texts, measure_texts, reach_of, windows
from train.evaluate.subject import Subject
from train.model.transformer import Reading

LENGTHS = (*range(12), 13, 16, 17, 31, 32, 33, 64, 65, 100)


def lengths() -> list[int]:
    return [int(length) for length in np.random.default_rng(0).integers(1, 400, size=40)]


class TestWindows:
    @pytest.mark.parametrize("first", [1, 2])
    @pytest.mark.parametrize(
        ("context", "stride"), [(2, 1), (2, 2), (3, 2), (8, 1), (8, 3), (8, 4), (8, 7), (8, 8), (32, 16), (200, 100)]
    )
    def test_the_definition(self, context: int, stride: int, first: int) -> None:
        for num_tokens in LENGTHS:
            found = list(windows(num_tokens, first=first, context=context, stride=stride))
            assert [place for window in found for place in range(window.first, window.end)] == list(range(first, num_tokens))
            for number, window in enumerate(found):
                assert 0 <= window.start < window.first < window.end
                assert window.end - 1 - window.start <= context, "the last token is a target alone"
                least = 1 if number == 0 else context + 1 - stride
                assert window.first - window.start >= least
                assert window.start == max(0, window.end - 1 - context), "as much is read as can be"
                assert window.num_targets <= (context + 1 - first if number == 0 else stride)

    @pytest.mark.parametrize("context", [2, 5, 16, 33])
    def test_without_overlap_they_are_those_of_lm_eval(self, context: int) -> None:
        for length in (1, 2, context - 1, context, context + 1, 2 * context, *lengths()):
            tokens = list(range(1, length + 1))
            theirs = get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=context, context_len=1)
            expected = [tuple(map(list, make_disjoint_window(pair))) for pair in theirs]
            whole = [0, *tokens]
            ours = [
                (whole[window.start : window.first], whole[window.first : window.end])
                for window in windows(len(whole), first=1, context=context, stride=context)
            ]
            assert ours == expected


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject_in(tmp_path_factory.mktemp("subject"))


class TestReach:
    def test_of_a_run_it_is_what_it_was_trained_on(self, subject: Subject) -> None:
        assert reach_of(TaskConfig(), subject) == Reach(context=64, stride=32)
        assert reach_of(TaskConfig(context=160), subject) == Reach(context=160, stride=80)
        assert reach_of(TaskConfig(context=3), subject) == Reach(context=3, stride=1)
        assert reach_of(TaskConfig(stride=64), subject) == Reach(context=64, stride=64)

    def test_of_any_other_model_it_is_all_that_it_reads(self, subject: Subject) -> None:
        class Foreign:
            model = replace(LLAMA, max_positions=100)

        assert reach_of(TaskConfig(), replace(subject, model=Foreign.model, reader=Foreign())) == Reach(context=100, stride=50)  # type: ignore[arg-type]

    def test_what_does_not_fit(self, subject: Subject) -> None:
        with pytest.raises(UserError, match=r"task.context=161: the model reads at most 160 tokens; give no more"):
            reach_of(TaskConfig(context=161), subject)
        with pytest.raises(UserError, match=r"task.stride=65: must not exceed the context of 64, or tokens would be left out"):
            reach_of(TaskConfig(stride=65), subject)


def source_of(*documents: list[int]) -> TextSource:
    def runs(limit: int | None):
        for number, tokens in enumerate(documents[:limit]):
            yield TokenRun(id=f"a:{number}", source="a", tokens=np.array(tokens, dtype=np.int32))

    return TextSource(name="a", path="a.txt", hash="0", runs=runs)


def some_ids(count: int, seed: int = 0) -> list[int]:
    return [int(number) for number in np.random.default_rng(seed).integers(1, 280, size=count)]


REACH = Reach(context=64, stride=32)


class TestPieces:
    def test_many_documents_are_an_example_each(self, subject: Subject) -> None:
        documents = [some_ids(length) for length in (2000, *range(1, FEW_DOCUMENTS))]
        pieces = cut_texts([source_of(*documents)], subject, reach=REACH, limit=None)
        assert [piece.run.id for piece in pieces] == [f"a:{n}" for n in range(30) if n != 1], "one token predicts nothing"
        assert not any(piece.block for piece in pieces) and pieces[0].num_targets == 1999

    def test_few_documents_are_cut_into_blocks(self, subject: Subject) -> None:
        pieces = cut_texts([source_of(some_ids(5000), some_ids(40))], subject, reach=REACH, limit=None)
        assert [piece.run.id for piece in pieces] == ["a:0"] * 5 + ["a:1"]
        sizes = subject.bytes_of_ids()[pieces[0].run.tokens]
        borders = [int(sizes[: piece.windows[0].first].sum()) for piece in pieces[:5]] + [int(sizes.sum())]
        assert [piece.block for piece in pieces[:5]] == [f"@{a}-{b}" for a, b in itertools.pairwise(borders)]
        assert sum(piece.num_targets for piece in pieces) == 4999 + 39
        assert all(BLOCK_TARGETS <= piece.num_targets < BLOCK_TARGETS + 64 for piece in pieces[:4])

    def test_blocks_of_another_stride_go_by_other_names(self, subject: Subject) -> None:
        """A comparison of the two would pair different texts."""
        source = source_of(some_ids(5000))
        names = [
            {piece.block for piece in cut_texts([source], subject, reach=Reach(context=64, stride=stride), limit=None)}
            for stride in (32, 50)
        ]
        assert len(names[0] & names[1]) <= 1, "the ends of two blocks may meet by chance"

    def test_the_limit_is_of_documents(self, subject: Subject) -> None:
        sources = [source_of(some_ids(9), some_ids(9), some_ids(9)), source_of(some_ids(9), some_ids(9))]
        assert [piece.run.id for piece in cut_texts(sources, subject, reach=REACH, limit=1)] == ["a:0", "a:0"]

    @pytest.mark.parametrize("documents", [[], [[]], [[5]], [[5], [], [7]]])
    def test_nothing_to_predict(self, subject: Subject, documents: list[list[int]]) -> None:
        with pytest.raises(UserError, match=r"a.txt: holds no token with another before it.*give more text"):
            cut_texts([source_of(*documents)], subject, reach=REACH, limit=None)

    def test_what_the_model_has_learned_to_find_first_is_no_target(self, subject: Subject) -> None:
        opened = replace(subject, opening=(0, 0))
        (piece,) = cut_texts([source_of([5, 6, 7])], opened, reach=REACH, limit=None)
        assert piece.num_targets == 3 and piece.run.tokens.tolist() == [0, 0, 5, 6, 7]

    def test_an_id_beyond_the_vocabulary(self, subject: Subject) -> None:
        with pytest.raises(UserError, match=r"a:1: token id 290 is beyond the model's vocabulary of 290"):
            cut_texts([source_of([1, 289], [1, 290])], subject, reach=REACH, limit=None)

    def test_a_tokenizer_without_bytes_is_told_before_weights_are_read(self, subject: Subject) -> None:
        class Tokenizer:
            def token_bytes(self) -> None:
                raise UserError("its tokens do not stand for the bytes of the text")

        with pytest.raises(UserError, match="do not stand for the bytes"):
            cut_texts([source_of([1, 2])], replace(subject, tokenizer=Tokenizer()), reach=REACH, limit=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("reach", [Reach(context=64, stride=64), Reach(context=20, stride=7)], ids=["disjoint", "overlapping"])
def test_the_loss_of_documents_is_that_of_each_window_run_alone(tmp_path: Path, model, reach: Reach) -> None:
    subject = subject_in(tmp_path, model)
    engines = engines_of(subject)
    documents = [some_ids(length, seed=length) for length in (90, 2, 64, 65, 21)]
    pieces = cut_texts([source_of(*documents)], subject, reach=reach, limit=None)
    told: list[int] = []
    examples = measure_texts(pieces, subject, engines.scorer, progress=told.append)
    assert [example.id.partition("@")[0] for example in examples] == [f"a:{number}" for number in range(5)]
    assert sum(example.target_tokens for example in examples) == sum(map(len, documents)) - 5
    assert abs(sum(told) - sum(map(len, documents))) < 0.2 * sum(map(len, documents))
    decoder = engines.scorer.decoder
    for example, tokens in zip(examples, documents, strict=True):
        expected = 0.0
        for window in windows(len(tokens), first=1, context=reach.context, stride=reach.stride):
            read = torch.tensor(tokens[window.start : window.end - 1])
            decoder.read_as(Reading(sequence_length=len(read), document_mask=False))
            with torch.no_grad():
                logits_TV = decoder.logits(read, torch.arange(len(read)), torch.tensor([0, len(read)]))
            targets = torch.tensor(tokens[window.first : window.end])
            losses = torch.nn.functional.cross_entropy(logits_TV[-len(targets) :].double(), targets, reduction="sum")
            expected += losses.item()
        assert example.loss == pytest.approx(expected, rel=1e-5)
        assert example.scores["loss"] == example.loss / example.target_tokens
        text = subject.tokenizer.decode(tokens[1:])
        assert example.input == text[: len(example.input)] and example.source == "a"
        table = subject.tokenizer.token_table
        assert example.target_bytes == sum(len(table[number]) for number in tokens[1:] if number < len(table))
