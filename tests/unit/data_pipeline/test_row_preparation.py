"""From files to a folder of encoded rows: what is held out, what is left out and counted, what is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from conf.errors import ConfigError, UserError
from data_pipeline.encoded_rows import EncodedRows
from data_pipeline.row_preparation import prepare_rows
from data_pipeline.rows_config import RowsConfig
from data_pipeline.shown_example import shown_example
from data_pipeline.task_config import TaskConfig, TaskSource
from data_pipeline.tokenizer import Tokenizer
from tests.unit.data_pipeline.labelled import chat, json_lines, prepared, task_of, tokenizer_in

PAIRS = [{"prompt": f"the user asks {number}:", "completion": f" {'one ' * (number % 5)}{number}"} for number in range(60)]
GOOD = {"prompt": "a", "completion": "b"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


def texts_of(encoded: EncodedRows, tokenizer: Tokenizer, split: str) -> list[str]:
    arrays = encoded.arrays(split)  # type: ignore[arg-type]
    starts = arrays.row_starts_R1.tolist()
    return [
        tokenizer.decode([*arrays.tokens_N[first:last].tolist(), int(arrays.labels_N[last - 1])])
        for first, last in zip(starts, starts[1:], strict=False)
    ]


class TestSplits:
    def test_every_row_is_on_one_side(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        task = task_of("generation", json_lines(tmp_path / "a.jsonl", *PAIRS))
        encoded = prepared(task, tokenizer, tmp_path / "rows", validation_fraction=0.2)
        train, held_out = (texts_of(encoded, tokenizer, split) for split in ("train", "validation"))
        assert sorted(train + held_out) == sorted(pair["prompt"] + pair["completion"] for pair in PAIRS)
        assert 3 < len(held_out) < 25 and (encoded.num_rows("train"), encoded.num_rows("validation")) == (
            len(train), len(held_out),
        )  # fmt: skip
        assert [row.prompt + row.prefix + row.truths[0] for row in encoded.validation_rows()] == held_out
        other = prepared(task, tokenizer, tmp_path / "other", validation_fraction=0.2, seed=1)
        assert texts_of(other, tokenizer, "validation") != held_out
        moved = json_lines(tmp_path / "b.jsonl", *PAIRS[::-1])
        again = prepared(task_of("generation", moved), tokenizer, tmp_path / "again", validation_fraction=0.2)
        assert sorted(texts_of(again, tokenizer, "validation")) == sorted(held_out), "by what they say, not where they stand"

    def test_duplicates_fall_on_one_side(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        task = task_of("generation", json_lines(tmp_path / "a.jsonl", *(PAIRS * 3)))
        encoded = prepared(task, tokenizer, tmp_path / "rows", validation_fraction=0.3)
        train, held_out = (texts_of(encoded, tokenizer, split) for split in ("train", "validation"))
        assert not set(train) & set(held_out) and len(held_out) % 3 == 0 and encoded.report.shared == 0

    def test_at_least_one_row_is_held_out(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        task = task_of("generation", json_lines(tmp_path / "a.jsonl", *PAIRS[:5]))
        assert prepared(task, tokenizer, tmp_path / "rows", validation_fraction=1e-9).num_rows("validation") == 1
        assert prepared(task, tokenizer, tmp_path / "none", validation_fraction=0.0).num_rows("validation") == 0

    def test_files_of_their_own(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        train, held_out = json_lines(tmp_path / "a.jsonl", *PAIRS), json_lines(tmp_path / "b.jsonl", *PAIRS[:3], GOOD)
        encoded = prepared(task_of("generation", train, validation=(held_out,)), tokenizer, tmp_path / "rows")
        assert (encoded.num_rows("train"), encoded.num_rows("validation"), encoded.report.shared) == (60, 4, 3)
        assert encoded.row_ids("validation") == [f"b.jsonl:{number}" for number in range(1, 5)]
        assert any("3 of the held-out rows are among the training rows" in line for line in encoded.report.lines())


class TestLabels:
    def labels(self, path: Path, tokenizer: Tokenizer, *found: object, **changes: object) -> EncodedRows:
        rows = [{"sentence": f"text {number}", "label": label} for number, label in enumerate(found)]
        task = task_of("classification", json_lines(path / "a.jsonl", *rows), **changes)
        return prepared(task, tokenizer, path / "rows")

    def test_in_order(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        for number, (found, expected) in enumerate(
            [((10, 9, 9, 2), ("2", "9", "10")), (("b", "a", "10", "9"), ("10", "9", "a", "b"))]
        ):
            folder = tmp_path / str(number)
            folder.mkdir()
            encoded = self.labels(folder, tokenizer, *found)
            assert encoded.labels == expected
            labels_N = encoded.arrays("train").labels_N
            assert [expected[label] for label in labels_N[labels_N >= 0].tolist()] == [str(label) for label in found]

    def test_given_ones_keep_their_order(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        assert self.labels(tmp_path, tokenizer, "a", "b", labels=("b", "c", "a")).labels == ("b", "c", "a")

    def test_one_that_is_only_held_out(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        train = json_lines(tmp_path / "a.jsonl", {"text": "a", "label": "x"}, {"text": "b", "label": "y"})
        held_out = json_lines(tmp_path / "b.jsonl", {"text": "c", "label": "x"}, {"text": "d", "label": "z"})
        task = task_of("classification", train, validation=(held_out,))
        with pytest.raises(UserError, match=r"b.jsonl:2: label 'z' is none of those to learn \(x, y\) \(unknown label\)"):
            prepared(task, tokenizer, tmp_path / "rows")
        encoded = prepared(task, tokenizer, tmp_path / "rows", bad_rows="drop")
        assert (encoded.labels, encoded.num_rows("validation")) == (("x", "y"), 1)

    def test_a_rare_one_stays_where_it_can_be_learned(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        rows = [{"text": f"t{number}", "label": number // 2} for number in range(60)]
        task = task_of("classification", json_lines(tmp_path / "a.jsonl", *rows))
        encoded = prepared(task, tokenizer, tmp_path / "rows", validation_fraction=0.5)
        assert len(encoded.labels) == 30 and encoded.num_rows("validation") > 0

    @pytest.mark.parametrize(
        ("found", "expected"),
        [
            (("a", "a"), "its rows have 1 labels (a); a classification needs 2"),
            (("a", 0.5), "a.jsonl:2: column label holds 0.5, a number with a fraction"),
            (("a", -1, "b"), "a.jsonl:2: column label holds -1, which is no label"),
            (("a", "", "b"), "a.jsonl:2: column label holds '', which is no label"),
            (("a", None, "b"), "a.jsonl:2: column label holds 0 labels"),
        ],
    )
    def test_what_is_refused(self, tmp_path: Path, tokenizer: Tokenizer, found: tuple[object, ...], expected: str) -> None:
        with pytest.raises(UserError) as caught:
            self.labels(tmp_path, tokenizer, *found)
        assert expected in str(caught.value)


BAD_LINES = {
    b'{"prompt": "a", "completion": ""}\n': ("empty answer", "a.jsonl:2: its answer is empty"),
    b'{"prompt": "a"}\n': ("missing column", "a.jsonl:2: task.target=completion is no column"),
    b'{"completion": "a"}\n': ("missing column", "a.jsonl:2: task.prompt names 'prompt'"),
    b'{"prompt": null, "completion": "a"}\n': ("wrong kind of value", "a.jsonl:2: task.prompt cannot be filled in"),
    b'{"prompt": "a", "completion": {"x": 1}}\n': ("wrong kind of value", "holds dict, not text"),
    b'{"prompt": \n': ("no row of its format", "a.jsonl:2: is not JSON"),
    b'["a"]\n': ("no row of its format", "a.jsonl:2: is list, not an object"),
    b'{"prompt": "\xff", "completion": "a"}\n': ("not UTF-8", "a.jsonl:2: is not UTF-8"),
    b'{"prompt": "a", "completion": "\\ud800"}\n': ("not UTF-8", "a.jsonl:2: holds half of a surrogate pair"),
}


class TestBadRows:
    @pytest.mark.parametrize(("line", "said"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
    def test_stop_or_drop(self, tmp_path: Path, tokenizer: Tokenizer, line: bytes, said: tuple[str, str]) -> None:
        good = json.dumps(GOOD).encode() + b"\n"
        (tmp_path / "a.jsonl").write_bytes(good + line + good)
        task = task_of("generation", tmp_path / "a.jsonl")
        with pytest.raises(UserError) as caught:
            prepared(task, tokenizer, tmp_path / "rows")
        reason, text = said
        assert text in str(caught.value) and f"({reason}); mend them, or leave them out" in str(caught.value)
        assert "data.bad_rows=drop" in str(caught.value) and not (tmp_path / "rows").exists()
        report = prepared(task, tokenizer, tmp_path / "rows", bad_rows="drop").report
        (dropped,) = report.dropped
        assert (dropped.reason, dropped.count, report.read, report.train.rows) == (reason, 1, 3, 2)
        assert text in dropped.first and any(f"left out: 1 ({reason})" in line for line in report.lines())

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.csv", b'prompt,completion\na,b\n\xff,c\n"d,\xfe\ne",f\ng,h\n'),
            ("a.tsv", b"prompt\tcompletion\na\tb\n\xff\tc\n\xfed\tf\ng\th\n"),
        ],
    )
    def test_lines_of_a_table_that_are_not_utf8(self, tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        encoded = prepared(task_of("generation", tmp_path / name), tokenizer, tmp_path / "rows", bad_rows="drop")
        assert texts_of(encoded, tokenizer, "train") == ["ab", "gh"]
        assert [(drop.reason, drop.count) for drop in encoded.report.dropped] == [("not UTF-8", 2)]

    def test_all_kinds_are_told_at_once(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        lines = [{"prompt": "a"}, {"prompt": "a", "completion": ""}, GOOD, {"prompt": "a", "completion": " "}]
        with pytest.raises(UserError) as caught:
            prepared(task_of("generation", json_lines(tmp_path / "a.jsonl", GOOD, *lines)), tokenizer, tmp_path / "rows")
        assert str(caught.value).startswith("a.jsonl:2: task.target=completion is no column")
        assert "and 2 more rows are bad (in all 2 empty answer, 1 missing column)" in str(caught.value)

    def test_none_is_left(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        task = task_of("generation", json_lines(tmp_path / "a.jsonl", {"prompt": "a", "completion": ""}))
        with pytest.raises(UserError, match=r"task.data: no row is left of it \(1 empty answer, the first: a.jsonl:1"):
            prepared(task, tokenizer, tmp_path / "rows", bad_rows="drop")
        (tmp_path / "a.jsonl").write_text("")
        with pytest.raises(UserError, match=r"a.jsonl: holds no row; give another file"):
            prepared(task, tokenizer, tmp_path / "rows", bad_rows="drop")

    def test_cut_rows_are_counted_and_no_fault(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        long = {"prompt": "one, two " * 100, "completion": "b"}
        encoded = prepared(task_of("generation", json_lines(tmp_path / "a.jsonl", GOOD, long)), tokenizer, tmp_path / "rows")
        assert (encoded.report.train.cut, encoded.report.train.rows, encoded.report.dropped) == (1, 2, ())
        assert any("1 rows cut" in line for line in encoded.report.lines())

    def test_a_template_that_fails(self, tmp_path: Path) -> None:
        tokenizer = tokenizer_in(
            tmp_path / "t", template="{% if messages|length > 2 %}{{ raise_exception('long') }}{% endif %}x"
        )
        rows = ({"messages": chat("a", "b")}, {"messages": chat("a", "b", "c", "d")})
        task = task_of("dialogue", json_lines(tmp_path / "a.jsonl", *rows))
        with pytest.raises(UserError, match=r"a.jsonl:2: the chat template of .* does not take it: long"):
            prepared(task, tokenizer, tmp_path / "rows", targets="all")

    def test_a_template_that_fails_where_the_answer_begins(self, tmp_path: Path) -> None:
        template = "{% if messages|length < 2 %}{{ raise_exception('short') }}{% endif %}{{ messages[1]['content'] }}"
        tokenizer = tokenizer_in(tmp_path / "t", template=template)
        path = json_lines(tmp_path / "a.jsonl", {"messages": chat("a", "b")})
        longer = json_lines(tmp_path / "b.jsonl", {"messages": chat("a", "b", "c", "d")}, {"messages": chat("a", "b")})
        task = task_of("dialogue", path, validation=(longer,))
        with pytest.raises(UserError, match=r"b.jsonl:2: the chat template of .* does not take it: short"):
            prepared(task, tokenizer, tmp_path / "rows", targets="all")
        assert prepared(task, tokenizer, tmp_path / "rows", targets="all", bad_rows="drop").num_rows("validation") == 1


class TestSettings:
    @pytest.mark.parametrize(
        ("kind", "changes", "expected"),
        [
            ("generation", {"targets": "assistant"}, "data.targets=assistant: is not for task=generation; give one of auto"),
            ("dialogue", {"targets": "completion"}, "data.targets=completion: is not for task=dialogue"),
            ("classification", {"targets": "all"}, "data.targets=all: is not for task=classification"),
            ("generation", {"template": "plain"}, "data.template: is for dialogues, this is task=generation"),
            ("classification", {"system": "x"}, "data.system: is for dialogues"),
        ],
    )
    def test_what_does_not_fit(
        self, tmp_path: Path, tokenizer: Tokenizer, kind: str, changes: dict[str, object], expected: str
    ) -> None:
        with pytest.raises(UserError) as caught:
            prepared(task_of(kind, json_lines(tmp_path / "a.jsonl", GOOD)), tokenizer, tmp_path / "rows", **changes)
        assert expected in str(caught.value)

    def test_other_tasks(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        with pytest.raises(UserError, match="task.kind=language: has no rows to learn from; give task=classification, task="):
            prepared(TaskConfig(), tokenizer, tmp_path / "rows")

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"sequence_length": 1}, "sequence_length=1: must be at least 2"),
            ({"validation_fraction": 1.0}, "validation_fraction=1.0: must be at least 0"),
            ({"validation_fraction": -0.1}, "validation_fraction=-0.1"),
            ({"template": ""}, "template='': needs a jinja file"),
            ({"system": ""}, "system='': a system turn without a word"),
        ],
    )
    def test_values(self, changes: dict[str, object], expected: str) -> None:
        with pytest.raises(ConfigError) as caught:
            RowsConfig(**changes)  # type: ignore[arg-type]
        assert expected in str(caught.value)

    def test_ids_that_the_model_does_not_know(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        task = task_of("dialogue", json_lines(tmp_path / "a.jsonl", {"messages": chat("a", "b")}))
        given = {"tokenizer": tokenizer, "opening": (), "end_of_document": 0, "seed": 0, "folders": [tmp_path / "rows"]}
        known = RowsConfig(sequence_length=64, validation_fraction=0.0)
        most = int(prepared(task, tokenizer, tmp_path / "all").arrays("train").tokens_N.max())
        for _ in range(2):
            with pytest.raises(UserError, match=rf"the rows hold token {most} \(.*the model knows ids below {most}"):
                prepare_rows(task, known, vocab_size=most, **given)  # type: ignore[arg-type]
            assert prepare_rows(task, known, vocab_size=most + 1, **given).num_rows("train") == 1  # type: ignore[arg-type]


def test_a_data_set_that_was_saved(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import datasets

    parts = {"train": datasets.Dataset.from_list(PAIRS), "test": datasets.Dataset.from_list([GOOD])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    sources = [TaskSource(path=str(tmp_path / "set"), split=split) for split in ("train", "test")]
    task = TaskConfig(kind="generation", name="lesson", data=(sources[0],), validation=(sources[1],))
    encoded = prepared(task, tokenizer, tmp_path / "rows")
    assert texts_of(encoded, tokenizer, "train") == [pair["prompt"] + pair["completion"] for pair in PAIRS]
    assert (texts_of(encoded, tokenizer, "validation"), encoded.row_ids("validation")) == (["ab"], ["set:1"])
    missing = dataclasses.replace(task, data=(dataclasses.replace(sources[0], split="dev"),))
    with pytest.raises(UserError, match=r"the data set .*set \(config None, split dev\) cannot be opened"):
        prepared(missing, tokenizer, tmp_path / "rows")


def test_dialogues_that_are_held_out_tell_what_was_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"messages": chat("a", "b", "c", "d")}]
    path = json_lines(tmp_path / "a.jsonl", *rows)
    encoded = prepared(task_of("dialogue", path, validation=(path,)), tokenizer, tmp_path / "rows", system="s")
    (row,) = encoded.validation_rows()
    assert row.prompt.startswith("<|im_start|>system\ns<|im_end|>\n") and row.prompt.endswith(
        "c<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (row.truths, list(row.messages)) == (("d",), rows[0]["messages"])
    assert encoded.endings == (tokenizer.backend.token_to_id("<|im_end|>"),)
    assert encoded.template is not None and "im_start" in encoded.template


def test_an_example_for_a_person(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task = task_of("generation", json_lines(tmp_path / "a.jsonl", {"prompt": "a\x1b[1m", "completion": "b"}))
    encoded = prepared(task, tokenizer, tmp_path / "rows")
    assert shown_example(encoded, tokenizer, colour=False) == "a\\x1b[1m\u27e6b<|endoftext|>\u27e7"
    assert shown_example(encoded, tokenizer, colour=True) == "a\\x1b[1m\x1b[32mb<|endoftext|>\x1b[0m"
    assert shown_example(encoded, tokenizer, colour=False, most=2) == "... \u27e6b<|endoftext|>\u27e7"
    talk = task_of("dialogue", json_lines(tmp_path / "b.jsonl", {"messages": chat("a", "b", "c", "d")}))
    shown = shown_example(prepared(talk, tokenizer, tmp_path / "rows"), tokenizer, colour=False)
    assert shown.count("\u27e6") == 2 and "<|im_start|>assistant\n\u27e6b<|im_end|>\u27e7\n" in shown
    labels = task_of("classification", json_lines(tmp_path / "c.jsonl", *({"text": one, "label": one} for one in "xy")))
    assert shown_example(prepared(labels, tokenizer, tmp_path / "rows"), tokenizer, colour=False) == "x -> \u27e6x\u27e7"


def test_a_tokenizer_whose_tokens_are_no_bytes(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders have them (WordPiece): labels need no bytes."""
    monkeypatch.setattr(Tokenizer, "token_table", property(lambda self: (_ for _ in ()).throw(UserError("no bytes"))))
    rows = json_lines(tmp_path / "c.jsonl", *({"text": one, "label": one} for one in "xy"))
    encoded = prepared(task_of("classification", rows), tokenizer, tmp_path / "rows")
    assert not np.any(encoded.token_bytes()) and shown_example(encoded, tokenizer, colour=False).startswith("x -> ")
