"""evaluation.json and examples.jsonl: written, read, found again; and what is said of files that are not whole."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from conf.errors import UserError
from train.scores.record import (
    EVALUATION_FILE,
    Evaluation,
    Example,
    Score,
    example_line,
    find_evaluations,
    read_evaluation,
    read_examples,
    write_examples,
)

FULL = Example(
    id="dev.tsv:17",
    source="dev.tsv",
    input='one\u2028two\n"three"',
    truths=("\u4f60\u597d", ""),
    output="\u043c\u0438\u0440",
    probabilities={"no": 0.25, "yes": 0.75},
    loss=math.pi,
    input_tokens=3,
    target_tokens=2,
    target_bytes=8,
    output_tokens=5,
    scores={"correct": 1.0, "loss": 0.1 + 0.2},
)


def evaluation(created: float = 1.0) -> Evaluation:
    return Evaluation(
        name="sst2",
        kind="classification",
        model={"path": "runs/first", "hash": "abc", "step": 7},
        data=[{"name": "a", "path": "a.tsv", "hash": "1"}, {"name": "b", "path": "b.tsv", "hash": "2:10"}],
        config={"task": {"labels": ["no", "yes"]}, "limit": None},
        scores={"accuracy": Score(value=0.5, low=0.25, high=0.75), "mcc": Score(value=None, undefined="one class")},
        curves={"reliability": [{"low": 0.0, "count": 3.0}]},
        signatures={"bleu": "nrefs:1"},
        counts={"examples": 2},
        run={"created": created, "versions": {"torch": "2"}},
    )


def kept(folder: Path, created: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    (folder / EVALUATION_FILE).write_text(evaluation(created).to_json(), encoding="utf-8")
    write_examples(folder / "examples.jsonl", [FULL, Example(id="dev.tsv:18")])
    return folder


def test_what_was_written_is_read(tmp_path: Path) -> None:
    read = read_evaluation(kept(tmp_path / "a"))
    expected = evaluation()
    assert {name: getattr(read, name) for name in vars(expected) if name != "folder"} == {
        name: getattr(expected, name) for name in vars(expected) if name != "folder"
    }
    assert read.folder == tmp_path / "a" and read.data_hash == "a:1 b:2:10"
    assert list(read.examples()) == [FULL, Example(id="dev.tsv:18")]
    assert str(tmp_path) not in (tmp_path / "a" / EVALUATION_FILE).read_text(), "where it lies is not part of it"


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "fp32"), ("cuda:0", "bf16")])
def test_auto_of_an_older_version_is_what_it_was(device: str, dtype: str, tmp_path: Path) -> None:
    """So that it compares with one that keeps what it was computed in."""
    folder = kept(tmp_path / "a")
    values = json.loads((folder / EVALUATION_FILE).read_text())
    values["config"]["dtype"], values["run"]["device"] = "auto", device
    (folder / EVALUATION_FILE).write_text(json.dumps(values))
    assert read_evaluation(folder).config["dtype"] == dtype


def test_a_line_leaves_out_what_is_usual(tmp_path: Path) -> None:
    assert example_line(Example(id="a:1")) == '{"id": "a:1"}\n'
    assert set(json.loads(example_line(FULL))) == set(vars(FULL))
    assert example_line(FULL).count("\n") == 1
    assert json.loads(example_line(Example(id="a", loss=0.0))) == {"id": "a", "loss": 0.0}, "zero is not none"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "damaged (JSONDecodeError"),
        (b"{", "damaged (JSONDecodeError"),
        (b'{"a": "\xff"}', "damaged (UnicodeDecodeError"),
        (b"[]", "damaged (TypeError"),
        (b'"a"', "damaged (AttributeError"),
        (b"{}", "damaged (KeyError: 'format_version')"),
        (b'{"format_version": 2}', "format_version=2, this Longhaul reads 1; remove"),
        (b'{"format_version": null}', "format_version=None, this Longhaul reads 1"),
        (b'{"format_version": 1, "scores": {}}', "damaged (TypeError"),
        (b'{"format_version": 1, "scores": {"loss": 3}}', "damaged (TypeError"),
        (b'{"format_version": 1, "scores": []}', "damaged (AttributeError"),
    ],
)
def test_a_damaged_evaluation(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / EVALUATION_FILE).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_evaluation(tmp_path)
    assert expected in str(caught.value) and EVALUATION_FILE in str(caught.value) and "evaluate again" in str(caught.value)


def test_a_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation.json: cannot be read \(No such file.*; give the folder of an evaluation"):
        read_evaluation(tmp_path)


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "3", '{"input": "a"}', '{"id": "a", "unknown": 3}', '{"id": "a", "truths": 3}', '{"id": "a"} x']
)
def test_a_damaged_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(f'{{"id": "a"}}\n{line}\n')
    with pytest.raises(UserError, match=r"examples.jsonl:2: damaged \(.*\); evaluate again"):
        list(read_examples(path))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_bytes(b'{"id": "a"}\n{"id": "\xff"}\n')
    with pytest.raises(UserError, match=r"examples.jsonl:2: damaged"):
        list(read_examples(path))
    path.unlink()
    with pytest.raises(UserError, match="examples.jsonl: cannot be read"):
        list(read_examples(path))


def test_all_of_a_run_the_oldest_first(tmp_path: Path) -> None:
    assert find_evaluations(tmp_path) == []
    for name, created in (("b", 3.0), ("a", 5.0), ("c", 4.0)):
        kept(tmp_path / "evaluations" / name, created)
    kept(tmp_path / "evaluations/.d.1a2b.partial", 1.0)
    (tmp_path / "evaluations/e").mkdir()
    (tmp_path / "evaluations/f").write_text("a file")
    found = find_evaluations(tmp_path)
    assert [one.folder.name for one in found if one.folder] == ["b", "c", "a"]
    (tmp_path / "evaluations/b" / EVALUATION_FILE).write_text("{")
    with pytest.raises(UserError, match=r"b/evaluation.json: damaged"):
        find_evaluations(tmp_path)
