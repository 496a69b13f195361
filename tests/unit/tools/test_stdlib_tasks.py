"""Rows from a small tree of source files whose docstrings are known; and what a corpus holds out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.errors import ConfigError, UserError
from data_pipeline.config import CorpusConfig
from data_pipeline.prepare import prepare
from tests.unit.data_pipeline.corpora import settings
from tools import stdlib_tasks
from tools.stdlib_tasks import StdlibTasksConfig, docstring_rows, first_sentence, masked, read_sources, run, summary_rows

TWELVE = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
MAIL = '''"""Read letters with the Mail package and MAILBOX names."""

class Letter:
    """A letter that was sent."""

    def get_sender(self, strict=False):
        """Return who sent the letter.

        Strict: fail without a name.
        """
        # look into the head
        name = self.head.get("From")

        return name if name or not strict else self.fail()

    async def fetch(self): """Nothing but words on one line."""

def shared():
    """Said in both of the packages."""
'''
NET = '''"""Send bytes over wires, not by post."""
def shared():
    "Said in both of the   packages"
def opened(host):
    r"""Open a socket to a host."""
    \x0c
    return socket(host)
def again(host):
    """Said twice in one place."""
def once_more(host):
    """Said twice in one place."""
'''


def a_tree(root: Path) -> Path:
    files = {
        "mail/letter.py": MAIL,
        "net/wire.py": NET,
        "net/old.py": "print 'no Python of today'\n",
        "net/latin.py": b"# \xe9\n",
        "net/test/wire.py": '"""A test of wires and of letters."""\n',
        "net/test_wire.py": '"""Another test of wires and letters."""\n',
        "alone.py": '"""A module that stands alone."""\n',
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def many_files(root: Path, *, files: int = 24) -> Path:
    """Two packages of several files, with enough in each."""
    for package in ("mail", "net"):
        for number in range(files):
            functions = [
                f"def {package}_{word}(x):\n"
                f'    """Turn the {word} of {package} number {number} around."""\n'
                f"    value = x + {number}\n    return {package}.{word}(value)\n"
                for word in TWELVE
            ]
            path = root / package / f"part{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(functions))
    return root


def test_reads_what_is_python_and_no_test(tmp_path: Path) -> None:
    files, unread = read_sources(a_tree(tmp_path))
    assert [file.name for file in files] == ["alone.py", "mail/letter.py", "net/wire.py"]
    assert unread == 2


def test_docstrings_of_all_kinds_with_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib_tasks, "LEAST_ROWS", {"train": 1, "validation": 0, "test": 0})
    files, _ = read_sources(a_tree(tmp_path))
    labels, rows = docstring_rows(files, {file.name: "train" for file in files}, num_labels=2)
    assert labels == ["mail", "net"]
    assert [(row["label"], row["kind"], row["text"]) for row in rows["train"]] == [
        ("mail", "module", "Read letters with the … package and …BOX names."),
        ("mail", "class", "A letter that was sent."),
        ("mail", "function", "Return who sent the letter. Strict: fail without a name."),
        ("mail", "function", "Nothing but words on one line."),
        ("net", "module", "Send bytes over wires, not by post."),
        ("net", "function", "Open a socket to a host."),
        ("net", "function", "Said twice in one place."),
    ]
    assert not rows["validation"] and not rows["test"]


def test_the_longer_of_two_names_is_masked_whole() -> None:
    assert masked("xmlrpc, XML and Xmlish e-mail", ["xml", "xmlrpc", "email"]) == "…, … and …ish e-mail"


def test_a_function_without_its_docstring_and_the_first_line_of_it(tmp_path: Path) -> None:
    files, _ = read_sources(a_tree(tmp_path))
    rows = summary_rows(files, {"mail/letter.py": "train", "net/wire.py": "test"})
    body = (
        '    # look into the head\n    name = self.head.get("From")\n\n    return name if name or not strict else self.fail()'
    )
    assert rows["train"] == [
        {
            "document": f"def get_sender(self, strict=False):\n{body}",
            "summary": "Return who sent the letter.",
            "name": "get_sender",
            "signature": "def get_sender(self, strict=False):",
            "body": body,
            "file": "mail/letter.py",
        }
    ]
    # A form feed begins no line, so the rest of the function is still whole.
    assert [row["document"] for row in rows["test"]] == ["def opened(host):\n    return socket(host)"]


@pytest.mark.parametrize(
    ("docstring", "line"),
    [
        ("Return the size of it.\n\nAnd more.", "Return the size of it."),
        ("Return the size of it.\nAnd more.", "Return the size of it."),
        ("Return the size of it,\nand more.", None),
        ("Return it", None),
        ("getsize(path) -> the size of it", None),
        (">>> return the size of", None),
        ("", None),
        (" ".join(["word"] * 15), None),
    ],
)
def test_a_first_line_is_a_sentence_of_its_own(docstring: str, line: str | None) -> None:
    assert first_sentence(docstring) == line


def lines_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_file_is_on_two_sides_and_twice_gives_the_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = many_files(tmp_path / "tree")
    for name in ("first", "second"):
        assert run(StdlibTasksConfig(out=str(tmp_path / name), source=str(source), labels=2)) == 0
    told = capsys.readouterr().out
    files = {}
    for task in ("classification", "summarisation"):
        for split in ("train", "validation", "test"):
            first, second = (tmp_path / name / task / f"{split}.jsonl" for name in ("first", "second"))
            assert first.read_bytes() == second.read_bytes()
            files[task, split] = {row["file"] for row in lines_of(first)}
            assert files[task, split] and f"{len(lines_of(first)):,} {split}" in told
        assert not files[task, "train"] & files[task, "test"]
        assert not files[task, "validation"] & (files[task, "train"] | files[task, "test"])
        assert len(set.union(*(files[task, split] for split in ("train", "validation", "test")))) == 48


def test_what_a_corpus_holds_out_is_tested(tmp_path: Path) -> None:
    source = many_files(tmp_path / "tree")
    tree = CorpusConfig(name="tree", reader="source_tree", paths=(str(source),), suffixes=(".py",))
    prepare(settings(source, tmp_path / "corpus", corpus=tree, held_out_fraction=0.3))
    config = StdlibTasksConfig(out=str(tmp_path / "out"), source=str(source), held_out_of=str(tmp_path / "corpus"), labels=2)
    run(config)
    shards = (tmp_path / "corpus").glob("validation-*.ids.jsonl")
    held_out = {json.loads(line) for shard in shards for line in shard.read_text().splitlines()}
    for task in ("classification", "summarisation"):
        for split in ("train", "validation", "test"):
            names = {f"tree/{row['file']}" for row in lines_of(tmp_path / "out" / task / f"{split}.jsonl")}
            assert names and (names <= held_out if split == "test" else not names & held_out)


def test_a_folder_of_the_same_settings_stays_and_another_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = many_files(tmp_path / "tree"), tmp_path / "out"
    run(StdlibTasksConfig(out=str(out), source=str(source), labels=2))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run(StdlibTasksConfig(out=str(out), source=str(source), labels=2))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists, and was not made with these settings; remove it, or give another out="):
        run(StdlibTasksConfig(out=str(out), source=str(source), labels=3))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_without_a_number_all_packages_that_have_enough_are_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = many_files(tmp_path / "tree"), tmp_path / "out"
    (source / "small").mkdir()
    (source / "small" / "part.py").write_text('"""A package with one docstring, which is not enough."""\n')
    assert run(StdlibTasksConfig(out=str(out), source=str(source))) == 0
    assert json.loads((out / "manifest.json").read_text())["labels"] == ["mail", "net"]
    monkeypatch.setattr(stdlib_tasks, "MOST_LABELS", 1)
    files, _ = read_sources(source)
    splits = ("train", "validation", "test")
    labels, _ = docstring_rows(files, {file.name: splits[number % 3] for number, file in enumerate(files)}, num_labels=None)
    assert len(labels) == 1, "the number that is taken by itself has an upper end"
    (source / "net").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(stdlib_tasks, "MOST_LABELS", 10)
    with pytest.raises(UserError, match="labels=2: only 1 packages have 40 docstrings to learn from"):
        run(StdlibTasksConfig(out=str(tmp_path / "other"), source=str(source)))


def test_nothing_is_written_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = many_files(tmp_path / "tree")
    with pytest.raises(UserError, match="labels=3: only 2 packages have 40 docstrings to learn from"):
        run(StdlibTasksConfig(out=str(tmp_path / "out"), source=str(source), labels=3))
    with pytest.raises(UserError, match="no such folder; stdlib: is"):
        run(StdlibTasksConfig(out=str(tmp_path / "out"), source=str(tmp_path / "none")))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stdlib_tasks, "write_json", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); nothing was kept"):
        run(StdlibTasksConfig(out=str(tmp_path / "out"), source=str(source), labels=2))
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_a_corpus_that_holds_none_of_the_files_out(tmp_path: Path, corpus: Path) -> None:
    source = many_files(tmp_path / "tree")
    with pytest.raises(UserError, match="holds out none of these files; prepare it with held_out_fraction=0.2"):
        run(StdlibTasksConfig(out=str(tmp_path / "out"), source=str(source), held_out_of=str(corpus), labels=2))


def test_held_out_rows_are_a_sample_of_all_files(tmp_path: Path) -> None:
    source = many_files(tmp_path / "tree")
    for name, most in (("all", None), ("some", 20)):
        run(StdlibTasksConfig(out=str(tmp_path / name), source=str(source), labels=2, most_held_out=most))
    for task in ("classification", "summarisation"):
        for split in ("validation", "test"):
            every, some = (lines_of(tmp_path / name / task / f"{split}.jsonl") for name in ("all", "some"))
            assert len(some) == 20 < len(every) and some == every[:20]
            assert len({row["file"] for row in some}) > 2
        path = Path(task) / "train.jsonl"
        assert (tmp_path / "all" / path).read_bytes() == (tmp_path / "some" / path).read_bytes()


def test_settings_that_do_not_do() -> None:
    with pytest.raises(ConfigError) as caught:
        StdlibTasksConfig(out="", source="", held_out_of="", labels=1, most_held_out=0)
    assert len(caught.value.problems) == 5
