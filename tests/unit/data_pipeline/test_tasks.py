"""Labelled rows out of every format that people keep them in; and what is said of files that are not what they seem."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from conf.errors import UserError
from data_pipeline.records import BadRow, Fault
from data_pipeline.task_config import TaskConfig, TaskSource
from data_pipeline.tasks import Row, hash_of, labelled_rows
from train.evaluate import reading

PAIRS = [("one good film", "yes"), ("one bad film", "no")]


def generation(*paths: Path, targets: Path | None = None, **changes: object) -> TaskConfig:
    sources = tuple(TaskSource(path=str(path), targets=None if targets is None else str(targets)) for path in paths)
    usual = {"kind": "generation", "prompt": "{text}", "metrics": ("bleu",), "data": sources}
    return TaskConfig(**usual | changes)  # type: ignore[arg-type]


def classification(*paths: Path, **changes: object) -> TaskConfig:
    usual = {"kind": "classification", "metrics": (), "labels": ("yes", "no")}
    return generation(*paths, **usual | changes)


def written(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(data)
    path.write_bytes(packed)
    return path


def json_lines(path: Path, *rows: object, ascii: bool = False) -> Path:
    return written(path, "".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in rows))


def parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def read_rows(task: TaskConfig, *, limit: int | None = None) -> list[Row]:
    return reading.read_rows(task, limit=limit)[0]


def pairs_of(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.prompt, row.truths[0]) for row in rows]


class TestFormats:
    @pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
    @pytest.mark.parametrize(
        ("suffix", "content"),
        [
            (".jsonl", "".join(json.dumps({"text": text, "target": target}) + "\n" for text, target in PAIRS)),
            (".ndjson", "\n\n".join(json.dumps({"text": text, "target": target}) for text, target in PAIRS)),
            (".csv", "target,text\nyes,one good film\nno,one bad film\n"),
            (".tsv", "text\ttarget\none good film\tyes\none bad film\tno"),
            (".TSV", "\ufefftext\ttarget\r\none good film\tyes\r\n\r\none bad film\tno\r\n"),
        ],
    )
    def test_text(self, tmp_path: Path, suffix: str, content: str, ending: str) -> None:
        path = written(tmp_path / f"dev.v1{suffix}{ending}", content)
        rows = read_rows(classification(path))
        assert pairs_of(rows) == PAIRS
        assert {row.source for row in rows} == {path.name}
        assert all(row.id.startswith(f"{path.name}:") for row in rows)

    def test_parquet(self, tmp_path: Path) -> None:
        columns = {"text": ["a", "b", "c"], "target": [["x", "y"], [], [None]], "n": [1, 2, 3]}
        rows = read_rows(generation(parquet(tmp_path / "a.parquet", columns)))  # type: ignore[arg-type]
        assert [(row.id, row.prompt, row.truths) for row in rows] == [
            ("a.parquet:1", "a", ("x", "y")),
            ("a.parquet:2", "b", ()),
            ("a.parquet:3", "c", ()),
        ]

    def test_a_csv_with_quotes_and_line_ends_inside(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.csv", 'text,target\r\n"he said ""no"",\r\nand left",yes\r\n  spaced ,no\r\n')
        rows = read_rows(classification(path))
        assert pairs_of(rows) == [('he said "no",\nand left', "yes"), ("  spaced ", "no")]
        assert [row.id for row in rows] == ["a.csv:3", "a.csv:4"]  # the line on which a row ends

    def test_a_field_of_a_csv_may_be_a_book(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.csv", f"text,target\n{'word ' * 40_000},yes\n")
        assert len(read_rows(classification(path))[0].prompt) == 200_000

    def test_a_tsv_has_no_quotes(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.tsv", '"open and never closed\tyes\nit\'s\rodd , "x"\tno\n')
        rows = read_rows(classification(path, columns=("text", "target")))
        assert pairs_of(rows) == [('"open and never closed', "yes"), ('it\'s\rodd , "x"', "no")]
        assert [row.id for row in rows] == ["a.tsv:1", "a.tsv:2"]

    def test_lines(self, tmp_path: Path) -> None:
        left = written(tmp_path / "val.de", "eins\r\n\r\ndrei\u2028vier\r\n")
        right = written(tmp_path / "val.en", "one\n\nthree")
        rows = read_rows(generation(left, targets=right))  # no ending says so, but two files of lines were given
        assert pairs_of(rows) == [("eins", "one"), ("", ""), ("drei\u2028vier", "three")]
        assert [row.id for row in rows] == ["val.de:1", "val.de:2", "val.de:3"]
        alone = written(tmp_path / "questions.txt", "a\nb\n")
        assert pairs_of(read_rows(generation(alone, target="text"))) == [("a", "a"), ("b", "b")]

    @pytest.mark.parametrize(
        "text",
        ["\u4eca\u5929\u597d", "\u043f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440", "\U0001f600"],
    )
    @pytest.mark.parametrize("ascii", [True, False])
    def test_any_script(self, tmp_path: Path, text: str, ascii: bool) -> None:
        path = json_lines(tmp_path / "a.jsonl", {"\u6587": text, "label": text}, ascii=ascii)
        (row,) = read_rows(classification(path, prompt="{\u6587}\\n=", target="label", labels=(text, "b")))
        assert (row.prompt, row.truths) == (f"{text}\n=", (text,))

    def test_what_a_format_says_goes_before_the_ending(self, tmp_path: Path) -> None:
        path = written(tmp_path / "dev.txt", "text\ttarget\na\tyes\n")
        assert pairs_of(read_rows(classification(path, format="tsv"))) == [("a", "yes")]

    def test_several_sources_a_limit_each_and_names(self, tmp_path: Path) -> None:
        one = json_lines(tmp_path / "one.jsonl", *({"text": f"{n}", "target": "yes"} for n in range(5)))
        two = written(tmp_path / "two.tsv", "target\ttext\nno\tx\n")
        rows = read_rows(classification(one, two), limit=2)
        assert [(row.source, row.id) for row in rows] == [
            ("one.jsonl", "one.jsonl:1"), ("one.jsonl", "one.jsonl:2"), ("two.tsv", "two.tsv:2"),
        ]  # fmt: skip
        named = TaskSource(path=str(two), name="other")
        assert read_rows(classification(data=(named,)))[0].source == "other"


class TestTargets:
    def test_nested_columns_and_no_answer(self, tmp_path: Path) -> None:
        rows = [
            {"text": "a", "answers": {"text": ["x", "y"], "start": [1, 2]}},
            {"text": "b", "answers": {"text": [], "start": []}},
            {"text": "c", "answers": {"text": None}},
            {"text": "d", "answers": {"text": "z"}},
        ]
        found = read_rows(generation(json_lines(tmp_path / "a.jsonl", *rows), target="answers.text", metrics=("answers",)))
        assert [row.truths for row in found] == [("x", "y"), (), (), ("z",)]

    @pytest.mark.parametrize("metrics", [("answers",), ("bleu",)])
    @pytest.mark.parametrize(("name", "changes"), [("answers", {}), ("answer", {}), ("said", {"fields": {"answers": "said"}})])
    def test_what_is_not_there_is_no_answer(
        self, tmp_path: Path, name: str, changes: dict[str, object], metrics: tuple[str, ...]
    ) -> None:
        path = parquet(tmp_path / "a.parquet", {"text": ["a", "b", "c"], name: [1.5, float("nan"), None]})
        found = read_rows(generation(path, metrics=metrics, target="answers", **changes))
        assert [row.truths for row in found] == [("1.5",), (), ()]

    def test_nulls_of_a_list_are_no_answers(self, tmp_path: Path) -> None:
        path = json_lines(tmp_path / "b.jsonl", {"text": "a", "target": [None, "x", None]}, {"text": "b", "target": [None]})
        assert [row.truths for row in read_rows(generation(path))] == [("x",), ()]

    def test_a_column_whose_name_has_a_dot(self, tmp_path: Path) -> None:
        path = json_lines(tmp_path / "a.jsonl", {"text": "a", "answers.text": "x", "answers": {"text": "y"}})
        assert read_rows(generation(path, target="answers.text"))[0].truths == ("x",)

    def test_numbers_are_texts(self, tmp_path: Path) -> None:
        path = json_lines(tmp_path / "a.jsonl", {"text": 3, "target": 1}, {"text": 0.5, "target": 0})
        assert pairs_of(read_rows(classification(path, labels=("0", "1")))) == [("3", "1"), ("0.5", "0")]

    def test_nested_fields_in_the_prompt(self, tmp_path: Path) -> None:
        path = json_lines(tmp_path / "a.jsonl", {"text": {"en": "a", "list": ["b", "c"]}, "target": "x"})
        (row,) = read_rows(generation(path, prompt="{text[en]} {text[list][1]} {{as it is}} {target}"))
        assert row.prompt == "a c {as it is} x"


def refused(task: TaskConfig, *expected: str) -> None:
    with pytest.raises(UserError) as caught:
        read_rows(task)
    said = str(caught.value)
    assert "\n" not in said and all(text in said for text in expected), said


class TestWhatIsWrongWithARow:
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"sentence": "a", "target": "yes"}, ["a.jsonl:2", "task.prompt names 'text'", "no column", "sentence, target"]),
            ({"text": "a", "label": "yes"}, ["a.jsonl:2", "task.target=target is no column", "text, label"]),
            ({"text": "a", "target": "maybe"}, ["a.jsonl:2", "'maybe' is not among task.labels=[yes, no]", "mend the row"]),
            ({"text": "a", "target": True}, ["a.jsonl:2", "'True' is not among"]),
            ({"text": "a", "target": ""}, ["a.jsonl:2", "'' is not among"]),
            ({"text": "a", "target": " yes"}, ["a.jsonl:2", "' yes' is not among"]),
            ({"text": "a", "target": None}, ["a.jsonl:2", "target holds 0 labels", "exactly one"]),
            ({"text": "a", "target": ["yes", "no"]}, ["a.jsonl:2", "target holds 2 labels"]),
            ({"text": "a", "target": {"text": "yes"}}, ["a.jsonl:2", "holds dict, not text", "target.text"]),
            ({"text": "a", "target": [["yes"]]}, ["a.jsonl:2", "holds list, not text"]),
            ({"text": None, "target": "yes"}, ["a.jsonl:2", "column text is null", "leave the row out"]),
            ({"text": float("nan"), "target": "yes"}, ["a.jsonl:2", "column text is null", "leave the row out"]),
            ({}, ["a.jsonl:2", "there are none"]),
        ],
    )  # fmt: skip
    def test_values(self, tmp_path: Path, row: dict[str, object], expected: list[str]) -> None:
        good = {"text": "a", "target": "yes"}
        refused(classification(json_lines(tmp_path / "a.jsonl", good, row)), *expected)

    @pytest.mark.parametrize(
        ("prompt", "expected"),
        [
            ("{0} {text}", "task.prompt cannot be filled in"),
            ("{} {text}", "task.prompt cannot be filled in"),
            ("{text[en]}", "task.prompt cannot be filled in"),
            ("{target[0]} {text[9]}", "task.prompt names"),
            ("{}", "task.prompt cannot be filled in"),
        ],
    )
    def test_prompts(self, tmp_path: Path, prompt: str, expected: str) -> None:
        path = json_lines(tmp_path / "a.jsonl", {"text": "a", "target": "yes"})
        if prompt == "{}":
            with pytest.raises(UserError, match="names no column"):
                classification(path, prompt=prompt)
            return
        refused(classification(path, prompt=prompt), "a.jsonl:1", expected)

    def test_a_nested_target_that_ends_early(self, tmp_path: Path) -> None:
        path = json_lines(tmp_path / "a.jsonl", {"text": "a", "answers": "x"})
        refused(generation(path, target="answers.text"), "a.jsonl:1", "task.target=answers.text is no column")

    def test_a_null_inside_a_column(self, tmp_path: Path) -> None:
        path = json_lines(tmp_path / "a.jsonl", {"text": {"en": None}, "target": "x"})
        refused(generation(path, prompt="{text[en]}"), "a.jsonl:1", "column text[en] is null")

    @pytest.mark.parametrize("columns", [{}, {"prompt": "", "fields": {"document": "text"}}])
    @pytest.mark.parametrize("value", [None, float("nan")])
    def test_a_null_is_no_summary(self, tmp_path: Path, value: object, columns: dict[str, object]) -> None:
        path = json_lines(tmp_path / "a.jsonl", {"text": "a", "summary": "x"}, {"text": "b", "summary": value})
        task = generation(path, **columns)
        _, bad = labelled_rows(task, task.data[0])
        assert isinstance(bad, BadRow) and bad.fault == Fault.EMPTY
        refused(task, "a.jsonl:2: task.target=summary is null", "leave the row out, or give an empty list")

    def test_good_rows_behind_many_bad_ones_are_read(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.jsonl", "no json\n" * 250 + json.dumps({"text": "a", "target": "yes"}) + "\n")
        task = classification(path)
        found = list(labelled_rows(task, task.data[0]))
        assert len(found) == 251 and pairs_of(found[250:]) == [("a", "yes")]


class TestWhatIsWrongWithAFile:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.txt", "a.parquet", "a.jsonl.gz", "a.csv.zst"])
    def test_none(self, tmp_path: Path, name: str) -> None:
        refused(generation(tmp_path / name, target="text"), f"{name}: cannot be read (No such file")

    @pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.parquet"])
    def test_a_folder(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).mkdir()
        refused(generation(tmp_path / name, target="text"), f"{name}: cannot be read (", "s a directory")

    @pytest.mark.parametrize(
        ("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.csv", "text,target\n"), ("a.tsv", ""), ("a.txt", "")]
    )
    def test_nothing_in_it(self, tmp_path: Path, name: str, content: str) -> None:
        refused(generation(written(tmp_path / name, content)), f"{name}: holds no row", "give another file")

    def test_no_row_group(self, tmp_path: Path) -> None:
        path = parquet(tmp_path / "a.parquet", {"text": [], "target": []})
        refused(generation(path), "a.parquet: holds no row")

    @pytest.mark.parametrize("name", ["a.json", "a", "a.gz", "dev.de", "a.xlsx"])
    def test_an_ending_that_tells_nothing(self, tmp_path: Path, name: str) -> None:
        refused(generation(written(tmp_path / name, "x")), f"{name}: its ending", "tells no format; give task.format=jsonl")

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b'{"text": "a", "target": "yes"}\n{"text": \n', ["a.jsonl:2: is not JSON", "task.format tells another"]),
            (b'[{"text": "a"}]\n', ["a.jsonl:1: is list, not an object", "write one object a line", "jq"]),
            (b'[\n {"text": "a"}\n]\n', ["a.jsonl:1: is not JSON", "write one object a line"]),
            (b'{\n "text": "a"\n}\n', ["a.jsonl:1: is not JSON", "write one object a line"]),
            (b'"a"\n', ["a.jsonl:1: is str, not an object"]),
            (b"null\n", ["a.jsonl:1: is NoneType, not an object"]),
            (b"[" * 100_000 + b"\n", ["a.jsonl:1: is not JSON"]),
            (b"\n\xff\xfe\n", ["a.jsonl:2: is not UTF-8", "byte 0 of the line"]),
            (b"PAR1\x15\x04\x00\x00", ["a.jsonl:1: holds NUL bytes", "task.format tells another format"]),
            ("{}".encode("utf-16"), ["a.jsonl:1: is not UTF-8"]),
        ],
        ids=range(10),
    )
    def test_json_lines(self, tmp_path: Path, content: bytes, expected: list[str]) -> None:
        refused(classification(written(tmp_path / "a.jsonl", content)), *expected)

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("a.tsv", "text\ttarget\na\tyes\nb\n", ["a.tsv:3: has 1 fields, the columns are text, target", "task.columns"]),
            ("a.csv", "text,target\na,b,yes\n", ["a.csv:2: has 3 fields"]),
            ("a.csv", 'text,target\n"a,yes\nb,no\n', ["a.csv:3: is no row of a CSV file (unexpected end of data)"]),
            ("a.csv", 'text,target\n"a"b,yes\n', ["a.csv:2: is no row of a CSV file", "task.format"]),
            ("a.csv", "text,text\na,yes\n", ["a.csv: its header names a column twice (text, text)", "task.columns=[...]"]),
            ("a.csv", "text\ttarget\na\tyes\n", ["a.csv:2", "there are text\ttarget; for a file without a header"]),
        ],
    )
    def test_tables(self, tmp_path: Path, name: str, content: str, expected: list[str]) -> None:
        refused(classification(written(tmp_path / name, content)), *expected)

    def test_a_table_without_the_columns_that_were_given(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.tsv", "a\tyes\n")
        with pytest.raises(UserError, match=r"a.tsv:1: has 2 fields, the columns are text, target, more$"):
            read_rows(classification(path, columns=("text", "target", "more")))

    @pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.zst", "a.txt.gz"])
    def test_a_damaged_archive(self, tmp_path: Path, name: str) -> None:
        path = written(tmp_path / name, "text,target\n" * 5000)
        path.write_bytes(path.read_bytes()[:-9])
        refused(generation(path), name)
        path.write_bytes(b"no archive at all")
        refused(generation(path), f"{name}: is a damaged archive (")

    def test_a_damaged_parquet(self, tmp_path: Path) -> None:
        path = parquet(tmp_path / "a.parquet", {"text": ["a"] * 500, "target": ["yes"] * 500})
        whole = path.read_bytes()
        for content in (b"{}", whole[: len(whole) // 2], b"", whole[:4] + b"\xff" * 60 + whole[64:]):
            path.write_bytes(content)
            refused(classification(path), "a.parquet: cannot be read")

    def test_lines_that_do_not_fit(self, tmp_path: Path) -> None:
        left, right = written(tmp_path / "a.de", "eins\nzwei\n"), written(tmp_path / "a.en", "one\n")
        refused(generation(left, targets=right), "a.de: has 2 lines", "a.en has 1", "as many")
        right.unlink()
        refused(generation(left, targets=right), "a.en: cannot be read")
        rows = json_lines(tmp_path / "a.jsonl", {"text": "a"})
        refused(generation(rows, targets=left), f"targets={left} is for format=lines, this is jsonl")


def test_the_hash_is_of_all_that_is_read(tmp_path: Path) -> None:
    left, right = written(tmp_path / "a.de", "eins\n"), written(tmp_path / "a.en", "one\n")
    both = TaskSource(path=str(left), targets=str(right))
    before = hash_of(both)
    assert hash_of(both) == before != hash_of(TaskSource(path=str(left)))
    written(right, "two\n")
    assert hash_of(both) != before
    right.unlink()
    with pytest.raises(UserError, match=r"a.en: cannot be read \(No such file"):
        hash_of(both)
