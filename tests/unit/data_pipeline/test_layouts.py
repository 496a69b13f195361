"""What the columns of a file are taken for; and what is said where that is not clear."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.errors import UserError
from data_pipeline.records import BadRow
from data_pipeline.tasks import Row, labelled_rows
from tests.unit.data_pipeline.labelled import json_lines, task_of


def rows_of(path: Path, kind: str, *given: dict[str, object], **changes: object) -> tuple[list[Row], list[str]]:
    """The rows of a file of these, and what was told of its columns."""
    task, told = task_of(kind, json_lines(path / "a.jsonl", *given), **changes), []
    rows = [row for row in labelled_rows(task, task.data[0], tell=told.append) if not isinstance(row, BadRow)]
    return rows, told


TRANSLATION = {"translation": {"de": "eins", "en": "one"}}


class TestWhatIsFound:
    @pytest.mark.parametrize(
        ("values", "changes", "expected", "told"),
        [
            ({"text": "t", "label": 1}, {"kind": "classification"}, ("t", ("1",)), "sentence=text, label"),
            ({"sentence": "t", "label": "x"}, {"kind": "classification"}, ("t", ("x",)), "(sentence, label)"),
            ({"text": "t", "target": "x"}, {"kind": "classification"}, ("t", ("x",)), "label=target"),
            ({"sentence1": "a", "sentence2": "b", "label": 0}, {"kind": "classification"}, ("a\nb", ("0",)), "two sentences"),
            ({"premise": "a", "hypothesis": "b", "label": 0}, {"kind": "classification"}, ("a\nb", ("0",)), "=premise"),
            ({"question1": "a", "question2": "b", "label": 0}, {"kind": "classification"}, ("a\nb", ("0",)), "question2"),
            ({"document": "d", "summary": "s"}, {}, ("d\n\nSummary:", ("s",)), "summarisation (document, summary)"),
            ({"article": "d", "highlights": "s", "id": "7"}, {}, ("d\n\nSummary:", ("s",)), "document=article"),
            ({"text": "d", "summary": "s"}, {}, ("d\n\nSummary:", ("s",)), "document=text"),
            ({"prompt": "p", "completion": "c"}, {}, ("p", ("c",)), "prompt and completion (prompt, completion)"),
            ({"prompt": "p", "response": "c"}, {}, ("p", ("c",)), "completion=response"),
            ({"text": "p", "target": "c"}, {}, ("p\n", ("c",)), "text and target"),
            (TRANSLATION, {"target_language": "en"}, ("eins\n", ("one",)), "text=translation.de, target=translation.en"),
            (TRANSLATION, {"source_language": "en"}, ("one\n", ("eins",)), "text=translation.en"),
            ({"body": "d", "abstract": {"en": "s"}}, {"fields": {"document": "body", "summary": "abstract.en"}},
             ("d\n\nSummary:", ("s",)), "document=body, summary=abstract.en"),
            ({"text": "t", "sentence": "u", "label": 1}, {"kind": "classification", "fields": {"sentence": "text"}},
             ("t", ("1",)), "sentence=text"),
        ],
    )  # fmt: skip
    def test_columns(
        self, tmp_path: Path, values: dict[str, object], changes: dict[str, str], expected: tuple[object, ...], told: str
    ) -> None:
        (row,), (line,) = rows_of(
            tmp_path, changes.get("kind", "generation"), values, **{k: v for k, v in changes.items() if k != "kind"}
        )
        assert (row.prompt, row.truths) == expected
        assert told in line and line.startswith("a.jsonl: rows of ")

    @pytest.mark.parametrize(
        ("answers", "truths"),
        [
            ({"text": ["x", "y"], "answer_start": [1, 2]}, ("x", "y")),
            ({"text": [], "answer_start": []}, ()),
            (["x"], ("x",)),
            ("x", ("x",)),
        ],
    )
    def test_question_answering(self, tmp_path: Path, answers: object, truths: tuple[str, ...]) -> None:
        values = {"id": "1", "context": "c", "question": "q", "answers": answers}
        ((row,), _) = rows_of(tmp_path, "generation", values)
        assert (row.prompt, row.truths, row.prefix) == ("c\n\nQuestion: q\nAnswer:", truths, " ")

    def test_a_prefix_of_ones_own(self, tmp_path: Path) -> None:
        values = {"prompt": "p", "completion": "c"}
        assert rows_of(tmp_path, "generation", values)[0][0].prefix == ""
        assert rows_of(tmp_path, "generation", values, target_prefix="\\n")[0][0].prefix == "\n"
        assert rows_of(tmp_path, "generation", values, prompt="{prompt}", target="completion")[0][0].prefix == " "

    def test_a_prompt_of_ones_own_finds_the_truth_and_other_names(self, tmp_path: Path) -> None:
        ((row,), told) = rows_of(tmp_path, "generation", {"article": "d", "highlights": "s"}, prompt="TL {document}")
        assert (row.prompt, row.truths, told) == ("TL d", ("s",), [])
        ((row,), _) = rows_of(tmp_path, "generation", TRANSLATION, prompt="{text}=", source_language="de")
        assert (row.prompt, row.truths) == ("eins=", ("one",))
        ((row,), _) = rows_of(tmp_path, "classification", {"sentence": "t", "label": 1}, prompt="<{sentence}>")
        assert (row.prompt, row.truths) == ("<t>", ("1",))

    def test_the_first_row_that_has_the_columns_tells(self, tmp_path: Path) -> None:
        rows, _ = rows_of(tmp_path, "generation", {"odd": 1}, {"document": "d", "summary": "s"})
        assert [row.id for row in rows] == ["a.jsonl:2"]


class TestWhatIsNotClear:
    @pytest.mark.parametrize(
        ("kind", "values", "changes", "expected"),
        [
            ("generation", {"a": 1, "b": 2}, {}, ["a.jsonl:1: its columns a, b are none", "document|article|text",
                                                  "task.fields={document"]),
            ("generation", {"document": "d", "summary": "s", "prompt": "p", "completion": "c"}, {},
             ["fit summarisation (document, summary) and prompt and completion (prompt, completion)", "task.fields"]),
            ("generation", {"document": "d", "article": "e", "summary": "s"}, {}, ["document|article"]),
            ("classification", {"text": "t", "sentence": "u", "label": 1}, {}, ["sentence|text", "task.fields={sentence"]),
            ("classification", {"text": "t", "stars": 1}, {}, ["its columns text, stars are none", "label: COLUMN"]),
            ("dialogue", {"prompt": "p", "chosen": "c", "rejected": "r"}, {}, ["are preferences; give task=preference"]),
            ("dialogue", {"messages": [], "instruction": "i", "output": "o"}, {}, ["fit messages (messages) and alpaca"]),
            ("dialogue", {"text": "t"}, {}, ["its columns text are none", "task.fields={instruction: COLUMN"]),
            ("generation", TRANSLATION, {}, ["column translation has de, en", "task.source_language and task.target_language"]),
            ("generation", TRANSLATION, {"target_language": "fr"}, ["task.target_language=fr: column translation has de, en"]),
            ("generation", {"a": 1}, {"fields": {"documnt": "a"}}, ["task.fields: documnt is no part of task=generation"]),
            ("generation", {"a": 1, "summary": "s"}, {"fields": {"document": "b"}}, ["names document=b, which its"]),
        ],
    )  # fmt: skip
    def test_is_told(
        self, tmp_path: Path, kind: str, values: dict[str, object], changes: dict[str, object], expected: list[str]
    ) -> None:
        with pytest.raises(UserError) as caught:
            rows_of(tmp_path, kind, values, **changes)
        assert all(text in str(caught.value) for text in expected), str(caught.value)
