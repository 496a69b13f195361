"""Prompts, answers and labels as ids and targets: by hand, and as evaluation has them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data_pipeline.records import BadRow, Fault
from data_pipeline.row_encoding import IGNORE, EncodedRow, RowEncoder
from data_pipeline.tasks import Row
from data_pipeline.tokenizer import Tokenizer
from tests.unit.data_pipeline.labelled import tokenizer_in


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


def encoder(tokenizer: Tokenizer, **changes: object) -> RowEncoder:
    usual = {
        "kind": "generation", "targets": "completion", "sequence_length": 100, "opening": (), "no_answer": "none of it",
        "end_of_document": tokenizer.end_of_document()[0],
    }  # fmt: skip
    return RowEncoder(tokenizer=tokenizer, **usual | changes)  # type: ignore[arg-type]


def row_of(prompt: str, *truths: str, prefix: str = " ") -> Row:
    return Row(id="a:1", source="a", prompt=prompt, truths=truths, prefix=prefix)


def encoded(encoder: RowEncoder, row: Row, *labels: str) -> EncodedRow:
    (found,) = encoder.encode([row], labels)
    assert isinstance(found, EncodedRow), found
    return found


def ids_and_targets(row: EncodedRow) -> tuple[list[int], list[int]]:
    """All tokens of the row, and those that are learned."""
    targets = [label for label in row.labels_N.tolist() if label != IGNORE]
    return [*row.inputs_N.tolist(), targets[-1]], targets


class TestAnswers:
    @pytest.mark.parametrize("opening", [(), (3,), (3, 2)])
    @pytest.mark.parametrize("prompt", ["the user asks:", "the user", "one, ", "\u4f60\u597d"])
    @pytest.mark.parametrize("answer", ["one", "ser", "two, three words", "\u4f60"])
    def test_parted_as_at_evaluation(self, tokenizer: Tokenizer, prompt: str, answer: str, opening: tuple[int, ...]) -> None:
        from types import SimpleNamespace

        from train.evaluate.rows import encode_pairs

        end = tokenizer.end_of_document()[0]
        row = encoded(encoder(tokenizer, opening=opening), row_of(prompt, answer))
        subject = SimpleNamespace(
            tokenizer=tokenizer, opening=opening, first=opening or (end,), model=SimpleNamespace(max_positions=10_000)
        )
        (pair,) = encode_pairs(subject, prompt, [f" {answer}"])  # type: ignore[arg-type]
        assert ids_and_targets(row) == ([*pair.context, *pair.continuation, end], [*pair.continuation, end])
        assert row.inputs_N.dtype == row.labels_N.dtype == "int32" and not row.is_cut

    def test_by_hand(self, tokenizer: Tokenizer) -> None:
        row = encoded(encoder(tokenizer), row_of("a\n", "b", prefix=""))
        a, line, b, end = *tokenizer.encode("a\nb"), tokenizer.end_of_document()[0]
        assert row.inputs_N.tolist() == [a, line, b]
        assert row.labels_N.tolist() == [IGNORE, b, end]

    def test_everything_is_a_target(self, tokenizer: Tokenizer) -> None:
        row = encoded(encoder(tokenizer, targets="all"), row_of("the user asks:", "one"))
        ids = [*tokenizer.encode("the user asks: one"), tokenizer.end_of_document()[0]]
        assert (row.inputs_N.tolist(), row.labels_N.tolist()) == (ids[:-1], ids[1:])

    def test_an_end_that_the_text_holds_stays_text(self, tokenizer: Tokenizer) -> None:
        row = encoded(encoder(tokenizer), row_of("a <|endoftext|>", "b<|endoftext|>"))
        assert tokenizer.end_of_document()[0] not in row.inputs_N.tolist()

    def test_without_an_answer(self, tokenizer: Tokenizer) -> None:
        one, other = (encoded(encoder(tokenizer), row) for row in (row_of("a", "none of it"), row_of("a")))
        assert ids_and_targets(one) == ids_and_targets(other)

    def test_without_a_prompt(self, tokenizer: Tokenizer) -> None:
        end = tokenizer.end_of_document()[0]
        ids = tokenizer.encode("one")
        assert ids_and_targets(encoded(encoder(tokenizer), row_of("", "one", prefix=""))) == ([end, *ids, end], [*ids, end])

    @pytest.mark.parametrize("answer", ["", " ", "\n"])
    def test_an_empty_answer(self, tokenizer: Tokenizer, answer: str) -> None:
        (bad,) = encoder(tokenizer).encode([row_of("a", answer)])
        assert isinstance(bad, BadRow) and bad.fault == Fault.EMPTY and str(bad).startswith("a:1: its answer is empty")


class TestTooLong:
    @pytest.mark.parametrize("opening", [(), (3,)])
    def test_the_prompt_is_cut_on_its_left(self, tokenizer: Tokenizer, opening: tuple[int, ...]) -> None:
        row = row_of("one, two, three words " * 20, "an answer")
        whole = encoded(encoder(tokenizer, sequence_length=1000), row)
        cut = encoded(encoder(tokenizer, sequence_length=20, opening=opening), row)
        room = 20 - len(opening)
        assert cut.is_cut and cut.inputs_N.tolist() == [*opening, *whole.inputs_N.tolist()[-room:]]
        assert cut.labels_N.tolist() == [*[IGNORE] * len(opening), *whole.labels_N.tolist()[-room:]]

    @pytest.mark.parametrize("opening", [(), (3,)])
    def test_then_the_answer_on_its_right(self, tokenizer: Tokenizer, opening: tuple[int, ...]) -> None:
        row = row_of("the user asks:", "one, two, three words " * 20)
        whole = encoded(encoder(tokenizer, sequence_length=1000), row)
        cut = encoded(encoder(tokenizer, sequence_length=20, opening=opening), row)
        targets = [label for label in whole.labels_N.tolist() if label != IGNORE]
        assert cut.labels_N.tolist() == targets[:20] and cut.is_cut
        assert cut.inputs_N.tolist()[1:] == targets[:19]
        assert tokenizer.end_of_document()[0] not in cut.labels_N.tolist(), "the model must not learn to stop here"

    @pytest.mark.parametrize(("over", "is_cut"), [(0, False), (1, True)])
    def test_just_at_the_length(self, tokenizer: Tokenizer, over: int, is_cut: bool) -> None:
        row = row_of("the user asks:", "one")
        length = len(encoded(encoder(tokenizer), row).inputs_N)
        assert encoded(encoder(tokenizer, sequence_length=length - over), row).is_cut is is_cut

    def test_a_prompt_that_hides_all_answers(self, tokenizer: Tokenizer) -> None:
        made = encoder(tokenizer, sequence_length=4, opening=(3,) * 6).encode([row_of("the user asks:", "one")])
        assert isinstance(made[0], BadRow) and made[0].fault == Fault.NO_TARGET
        assert "data.sequence_length=4" in str(made[0])


class TestLabels:
    def test_at_the_last_token(self, tokenizer: Tokenizer) -> None:
        made = encoder(tokenizer, kind="classification", opening=(3,))
        row = encoded(made, row_of("one, two", "yes"), "no", "yes")
        assert row.inputs_N.tolist() == [3, *tokenizer.encode("one, two")]
        assert row.labels_N.tolist() == [*[IGNORE] * (len(row.inputs_N) - 1), 1]

    def test_a_long_text_keeps_its_end(self, tokenizer: Tokenizer) -> None:
        made = encoder(tokenizer, kind="classification", opening=(3,), sequence_length=9)
        row = encoded(made, row_of("one, two, three words " * 9, "no"), "no", "yes")
        assert row.is_cut and row.inputs_N.tolist() == [3, *tokenizer.encode("one, two, three words " * 9)[-8:]]
        assert row.labels_N.tolist() == [*[IGNORE] * 8, 0]

    def test_what_is_wrong(self, tokenizer: Tokenizer) -> None:
        made = encoder(tokenizer, kind="classification")
        rows = [row_of("a", "perhaps"), row_of(" ", "yes")]
        unknown, empty = made.encode(rows, ("no", "yes"))
        assert isinstance(unknown, BadRow) and (unknown.fault, str(unknown)) == (
            Fault.LABEL,
            "a:1: label 'perhaps' is none of those to learn (no, yes)",
        )
        assert isinstance(empty, BadRow) and empty.fault == Fault.EMPTY

    def test_a_text_of_which_the_tokenizer_makes_nothing(self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokenizer, "encode_all", lambda texts: [[] for _ in texts])
        (empty,) = encoder(tokenizer, kind="classification", opening=(3,)).encode([row_of("\u200b", "yes")], ("no", "yes"))
        assert isinstance(empty, BadRow) and empty.fault == Fault.EMPTY

    def test_an_opening_that_leaves_no_room(self, tokenizer: Tokenizer) -> None:
        made = encoder(tokenizer, kind="classification", opening=(3, 3), sequence_length=2)
        (bad,) = made.encode([row_of("one, two", "yes")], ("no", "yes"))
        assert isinstance(bad, BadRow) and str(bad) == "a:1: no token of it fits data.sequence_length=2; raise that"


def test_many_rows_are_as_each_alone(tokenizer: Tokenizer) -> None:
    rows = [replace(row_of(f"the user asks: {number}", "one, two"), id=f"a:{number}") for number in range(50)]
    made = encoder(tokenizer)
    for row, together in zip(rows, made.encode(rows), strict=True):
        assert isinstance(together, EncodedRow)
        assert ids_and_targets(together) == ids_and_targets(encoded(made, row))
