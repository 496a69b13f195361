"""Prompts and texts behind them as tokens; labels and outputs of a small model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline.task_config import TaskConfig, TaskSource
from data_pipeline.tasks import Row
from tests.unit.convert.checkpoints import GPT2
from tests.unit.evaluate.subjects import engines_of, subject_in
from train.evaluate.engines import Engines
from train.evaluate.rows import Encoded, encode_pairs, encode_rows, label_rows, text_until, write_rows
from train.evaluate.subject import Subject

DATA = (TaskSource(path="dev.jsonl"),)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject_in(tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="module")
def engines(subject: Subject) -> Engines:
    return engines_of(subject)


def row(prompt: str, *truths: str, number: int = 1) -> Row:
    return Row(id=f"dev.jsonl:{number}", source="dev.jsonl", prompt=prompt, truths=truths)


def labels(**changes: object) -> TaskConfig:
    return TaskConfig(kind="classification", data=DATA, prompt="{text}", labels=("def", "return"), **changes)  # type: ignore[arg-type]


def outputs(**changes: object) -> TaskConfig:
    usual = {"kind": "generation", "data": DATA, "prompt": "{text}", "metrics": ("bleu",), "max_new_tokens": 12}
    return TaskConfig(**usual | changes)  # type: ignore[arg-type]


def encode_one(subject: Subject, prompt: str, text: str) -> Encoded:
    (pair,) = encode_pairs(subject, prompt, [text])
    return pair


class TestEncoding:
    @pytest.mark.parametrize("prompt", ["def main(argv): ", "", "\u4f60\u597d", "return the text"])
    @pytest.mark.parametrize("text", [" of", "x", "\n\n", "ing", "\u4f60", "then again and again"])
    def test_both_together_are_the_whole(self, subject: Subject, prompt: str, text: str) -> None:
        pair = encode_one(subject, prompt, text)
        whole = tuple(subject.tokenizer.encode(prompt + text))
        context = pair.context if prompt else ()
        assert context + pair.continuation == whole and not pair.is_cut
        alone = tuple(subject.tokenizer.encode(prompt))
        assert alone[: len(context)] == context and len(alone) - len(context) <= 1, "parted where both still agree"
        assert pair.continuation and pair.request.context == pair.context

    def test_a_token_over_the_border_is_of_the_text(self, subject: Subject) -> None:
        assert len(subject.tokenizer.encode("te")) == len(subject.tokenizer.encode("text")) == 2  # t e, tex t
        pair = encode_one(subject, "a te", "xt")
        assert [subject.tokenizer.decode(ids) for ids in (pair.context, pair.continuation)] == ["a ", "text"]
        assert pair.num_bytes == len("text"), "its loss is that of the whole token"

    def test_texts_of_one_prompt_stand_behind_the_same_context(self, subject: Subject) -> None:
        """Else the one that joins the prompt would be scored with a part of it, and the other without."""
        pairs = encode_pairs(subject, "a te", ["xt", "zz"])
        assert [subject.tokenizer.decode(pair.context) for pair in pairs] == ["a ", "a "]
        assert [subject.tokenizer.decode(pair.continuation) for pair in pairs] == ["text", "tezz"]
        assert [pair.num_bytes for pair in pairs] == [4, 4]

    def test_an_example_that_no_metric_can_score(self, subject: Subject) -> None:
        with pytest.raises(UserError, match=r"dev.jsonl:1: task.target=target is empty, and bleu compare with a reference"):
            encode_rows([row("a")], outputs(), subject)
        assert encode_rows([row("a")], outputs(metrics=("answers",)), subject) == [[]]

    def test_nothing_before_the_text(self, subject: Subject) -> None:
        assert encode_one(subject, "", "a").context == (0,), "the end of another document"
        opened = replace(subject, opening=(7,))
        assert encode_one(opened, "", "a").context == (7,)
        assert encode_one(opened, "b", "a").context == (7, *subject.tokenizer.encode("b"))

    def test_a_tokenizer_that_names_neither_beginning_nor_end(self, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("train.inference.text_model.special_id", lambda tokenizer, role: None)
        with pytest.raises(UserError, match="names neither a beginning nor an end of texts, so nothing can stand first"):
            encode_one(subject, "", "a")

    def test_a_long_prompt_loses_its_beginning(self, subject: Subject) -> None:
        pair = encode_one(subject, "x" * 500, "abc")
        assert pair.is_cut and pair.continuation == tuple(subject.tokenizer.encode("abc"))
        assert len(pair.context) + len(pair.continuation) - 1 == subject.model.max_positions
        assert not encode_one(subject, "x" * 158, "abc").is_cut and encode_one(subject, "x" * 159, "abc").is_cut

    def test_the_opening_stays_before_a_long_prompt(self, subject: Subject) -> None:
        """As training keeps it."""
        opened, ids = replace(subject, opening=(7, 8)), subject.tokenizer.encode("x" * 500 + "y")
        pair = encode_one(opened, "x" * 500 + "y", "abc")
        assert pair.is_cut and pair.context == (7, 8, *ids[-(len(pair.context) - 2) :])
        assert len(pair.context) + len(pair.continuation) - 1 == subject.model.max_positions
        assert [encode_one(opened, "a", "x" * count).context for count in (160, 159)] == [(7,), (7, 8)]

    def test_a_text_that_is_none_or_too_long(self, subject: Subject) -> None:
        with pytest.raises(UserError, match=r"'': is no token behind 'some prompt'; give text of at least one"):
            encode_one(subject, "some prompt", "")
        assert len(encode_one(subject, "a", "x" * 160).context) == 1
        with pytest.raises(UserError, match=r"'x{40}'\.\.\.: has 161 tokens, the model reads 160"):
            encode_one(subject, "a", "x" * 161)

    def test_which_row_it_was(self, subject: Subject) -> None:
        rows = [row("a", "b"), row("a", "x" * 200, number=7)]
        with pytest.raises(UserError, match=r"^dev.jsonl:7: .* has 201 tokens"):
            encode_rows(rows, outputs(), subject)
        with pytest.raises(UserError, match=r"^dev.jsonl:1: .* has 201 tokens"):
            encode_rows([row("a", "def")], labels(label_texts=("x" * 200, "b")), subject)

    def test_what_is_scored_of_a_row(self, subject: Subject) -> None:
        found = encode_rows([row("a", "b", "c"), row("a"), row("a", "")], outputs(metrics=("answers",)), subject)
        assert [[subject.tokenizer.decode(pair.continuation) for pair in of_row] for of_row in found] == [[" b"], [], []]
        (pair, other), *rest = encode_rows([row("a", "def")] * 2, labels(), subject)
        assert subject.tokenizer.decode(other.continuation) == " return" and len(rest) == 1

    def test_no_room_for_a_prompt(self, subject: Subject) -> None:
        with pytest.raises(UserError, match=r"task.max_new_tokens=161: leaves no room for a prompt.* reads 160 tokens"):
            encode_rows([row("a", "b")], outputs(max_new_tokens=161), subject)


class TestLabels:
    def labelled(self, subject: Subject, engines: Engines, task: TaskConfig):
        rows = [row(f"main {number}", ("def", "return")[number % 2], number=number) for number in range(5)]
        pairs = encode_rows(rows, task, subject)
        losses = [one.loss for one in engines.scorer.score([pair.request for of_row in pairs for pair in of_row])]
        return label_rows(rows, pairs, task, engines.scorer, progress=lambda _: None), pairs, np.array(losses).reshape(5, 2)

    @pytest.mark.parametrize("scores", ["sum", "mean_per_token", "mean_per_byte"])
    def test_the_likeliest_wins(self, subject: Subject, engines: Engines, scores: str) -> None:
        task = labels(label_scores=scores, label_texts=("def main", "x"))
        outcome, pairs, losses_N2 = self.labelled(subject, engines, task)
        sizes = {"sum": [1, 1], "mean_per_token": [len(pair.continuation) for pair in pairs[0]], "mean_per_byte": [9, 2]}[
            scores
        ]
        compared = losses_N2 / np.array(sizes)
        for number, example in enumerate(outcome.examples):
            assert example.output == task.labels[int(compared[number].argmin())]
            expected = np.exp(-compared[number]) / np.exp(-compared[number]).sum()
            assert list(example.probabilities or {}) == ["def", "return"]
            assert list((example.probabilities or {}).values()) == pytest.approx(expected.tolist())
            truth = number % 2
            assert example.loss == pytest.approx(losses_N2[number, truth])
            assert (example.target_tokens, example.target_bytes) == (len(pairs[0][truth].continuation), (9, 2)[truth])
            assert example.input_tokens == len(pairs[number][truth].context) and example.id == f"dev.jsonl:{number}"
        assert outcome.cut_off == 0

    def test_prompts_that_were_too_long_are_counted(self, subject: Subject, engines: Engines) -> None:
        task = labels()
        rows = [row("x" * 300, "def"), row("x", "return")]
        pairs = encode_rows(rows, task, subject)
        assert [pair.is_cut for of_row in pairs for pair in of_row] == [True, True, False, False]
        assert pairs[0][0].context == pairs[0][1].context, "both labels stand behind the same"
        outcome = label_rows(rows, pairs, task, engines.scorer, progress=lambda _: None)
        assert outcome.cut_off == 1 and outcome.examples[0].input == "x" * 300

    def test_unlikely_labels_do_not_underflow(self, subject: Subject, engines: Engines) -> None:
        task = labels(label_texts=("x" * 100, "y" * 100))
        outcome, _, losses_N2 = self.labelled(subject, engines, task)
        assert losses_N2.min() > 200
        assert all(sum((one.probabilities or {}).values()) == pytest.approx(1.0) for one in outcome.examples)


class TestOutputs:
    def written(self, subject: Subject, engines: Engines, rows: list[Row], task: TaskConfig):
        pairs = encode_rows(rows, task, subject)
        return write_rows(rows, pairs, task, subject, engines=engines, progress=lambda _: None)

    def test_what_is_kept_of_each(self, subject: Subject, engines: Engines) -> None:
        rows = [row("def main(", "argv", "x"), row("x" * 400), row("again", "", number=3)]
        outcome = self.written(subject, engines, rows, outputs(stop=("never",), metrics=("answers",)))
        one, two, three = outcome.examples
        assert one.loss is not None and one.target_bytes == len(" argv") and one.truths == ("argv", "x")
        assert (two.loss, two.target_tokens, two.target_bytes) == (three.loss, three.target_tokens, 0) == (None, 0, 0)
        assert all(0 < example.output_tokens <= 12 for example in outcome.examples)
        assert two.input_tokens == subject.model.max_positions + 1 - 12 and outcome.cut_off == 1
        assert one.input_tokens == len(subject.tokenizer.encode("def main("))

    def test_the_opening_stays_before_a_long_prompt(self, subject: Subject) -> None:
        opened, found = replace(subject, opening=(7,)), []
        generator = SimpleNamespace(generate=lambda prompts, *_, **__: [found.append(one.ids) or () for one in prompts])
        engines = SimpleNamespace(generator=generator, scorer=SimpleNamespace(score=lambda _: []))
        rows, task = [row("x" * 400 + "y"), row("x")], outputs(metrics=("answers",))
        outcome = write_rows(rows, [[], []], task, opened, engines=engines, progress=lambda _: None)  # type: ignore[arg-type]
        room, ids = subject.model.max_positions + 1 - 12, subject.tokenizer.encode(rows[0].prompt)
        assert found == [(7, *ids[-(room - 1) :]), (7, *subject.tokenizer.encode("x"))]
        assert [example.input_tokens for example in outcome.examples] == [room, 2] and outcome.cut_off == 1

    def test_an_output_ends_at_a_stop(self, subject: Subject, engines: Engines) -> None:
        free = self.written(subject, engines, [row("def main(", "a")], outputs(stop=("never",))).examples[0]
        stop = free.output[3:5]
        bound = self.written(subject, engines, [row("def main(", "a")], outputs(stop=(stop,))).examples[0]
        assert bound.output == free.output.split(stop)[0].strip() and bound.output_tokens < free.output_tokens

    def test_the_prefix_is_of_the_truth_alone(self, tmp_path: Path) -> None:
        subject = subject_in(tmp_path, GPT2)
        engines = engines_of(subject)
        bare = self.written(subject, engines, [replace(row("main", "b"), prefix="")], outputs()).examples[0]
        spaced = self.written(subject, engines, [replace(row("main", "b"), prefix="\n")], outputs()).examples[0]
        assert bare.output == spaced.output and (bare.target_bytes, spaced.target_bytes) == (1, 2)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two", ("x",), "one two"),
        ("one two", (), "one two"),
        ("one\ntwo", ("\n",), "one"),
        ("one END two\n", ("\n", " END"), "one"),
        ("\n", ("\n",), ""),
        ("\u4e2d\u3002\u6587", ("\u3002",), "\u4e2d"),
    ],
)
def test_text_until(text: str, stops: tuple[str, ...], expected: str) -> None:
    assert text_until(text, stops) == expected
