"""Every reader on good input, and on every kind of bad input: counted, with its reason, and never the end of the rest."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard

from conf.errors import UserError
from data_pipeline.config import CorpusConfig
from data_pipeline.document import Document, Rejection, Rule
from data_pipeline.inputs import Inputs, list_inputs
from data_pipeline.io import open_input
from data_pipeline.readers import Item, read_unit


def corpus(reader: str, *paths: Path | str, **changes: object) -> CorpusConfig:
    return CorpusConfig(name="c", reader=reader, paths=tuple(map(str, paths)), **changes)  # type: ignore[arg-type]


def read_all(config: CorpusConfig) -> list[Item]:
    return [item for unit in list_inputs(config).units for item in read_unit(config, unit, lambda count: None)]


def documents(config: CorpusConfig) -> dict[str, str]:
    items = read_all(config)
    assert all(isinstance(item, Document) for item in items), items
    return {item.id: item.text for item in items if isinstance(item, Document)}


def rejections(config: CorpusConfig) -> dict[str, Rejection]:
    return {item.id: item for item in read_all(config) if isinstance(item, Rejection)}


def names_of(inputs: Inputs) -> list[str]:
    return [file.id for unit in inputs.units for file in unit.files]


def packed(text: bytes, ending: str) -> bytes:
    # With a checksum, as the zstd command writes it; without one, some damage cannot be seen.
    zstd = zstandard.ZstdCompressor(write_checksum=True)
    return {"": text, ".gz": gzip.compress(text), ".zst": zstd.compress(text)}[ending]


class TestInputs:
    def test_order_suffixes_and_excludes(self, tmp_path: Path) -> None:
        for name in ("b.py", "a.py", "a.txt", "skip/x.py", "sub/z.py", "sub/deep/y.py.gz", "test_a.py"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        config = corpus("source_tree", tmp_path, suffixes=(".py",), exclude=("skip", "test_*"))
        assert names_of(list_inputs(config)) == ["c/a.py", "c/b.py", "c/sub/z.py", "c/sub/deep/y.py.gz"]

    def test_files_patterns_and_several_paths(self, tmp_path: Path) -> None:
        for name in ("1/a.txt", "2/a.txt", "2/b.odd"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        assert names_of(list_inputs(corpus("text", tmp_path / "2" / "b.odd"))) == ["c/b.odd"]
        assert names_of(list_inputs(corpus("text", f"{tmp_path}/*/a.txt"))) == ["c/a.txt", "c/a.txt"]
        both = names_of(list_inputs(corpus("text", tmp_path / "1", tmp_path / "2", tmp_path / "1" / "a.txt")))
        assert len(both) == len(set(both)) == 2  # a file named twice is read once

    def test_links(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "a.txt").write_text("a")
        (tmp_path / "real" / "up").symlink_to(tmp_path)
        (tmp_path / "link").symlink_to(tmp_path / "real")
        (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
        os.mkfifo(tmp_path / "pipe.txt")
        inputs = list_inputs(corpus("text", tmp_path))
        assert len(names_of(inputs)) == 1
        assert {(item.id, item.rule) for item in inputs.rejected} == {
            ("c/gone.txt", Rule.UNREADABLE),
            ("c/pipe.txt", Rule.UNREADABLE),
        }

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="gone: no such file or folder"):
            list_inputs(corpus("text", tmp_path / "gone"))
        with pytest.raises(UserError, match=r"\*.txt: pattern matches no file"):
            list_inputs(corpus("text", f"{tmp_path}/*.txt"))
        (tmp_path / "a.bin").write_bytes(b"x")
        with pytest.raises(UserError, match=r"corpus c: no file ending in .txt .text .md in .*Check corpus.paths"):
            list_inputs(corpus("text", tmp_path))

    def test_the_standard_library(self) -> None:
        inputs = list_inputs(CorpusConfig(suffixes=(".py",), exclude=("site-packages", "dist-packages", "__pycache__")))
        assert "stdlib/json/decoder.py" in names_of(inputs)
        assert not any("site-packages" in name for name in names_of(inputs))
        assert len(inputs.units) > 1 and [unit.number for unit in inputs.units] == list(range(len(inputs.units)))

    def test_fingerprint_follows_the_files(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("one")
        config = corpus("text", tmp_path)
        before = list_inputs(config).fingerprint
        assert list_inputs(config).fingerprint == before
        path.write_text("other")
        assert list_inputs(config).fingerprint != before

    def test_names_that_are_not_utf8(self, tmp_path: Path) -> None:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("odd")
        config = corpus("text", tmp_path)
        assert documents(config) == {"c/\\xff.txt": "odd"} and list_inputs(config).fingerprint


class TestText:
    @pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
    def test_compressed_or_not(self, tmp_path: Path, ending: str) -> None:
        (tmp_path / f"a.txt{ending}").write_bytes(packed("h\u00e9llo\r\n".encode(), ending))
        assert documents(corpus("text", tmp_path)) == {f"c/a.txt{ending}": "h\u00e9llo\r\n"}

    def test_encodings(self, tmp_path: Path) -> None:
        (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfa")
        assert documents(corpus("text", tmp_path)) == {"c/bom.txt": "a"}
        (tmp_path / "bom.txt").write_bytes("\u00e9".encode("utf-16"))
        assert documents(corpus("text", tmp_path, encoding="utf-16")) == {"c/bom.txt": "\u00e9"}

    def test_undecodable(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"ab\xff")
        (tmp_path / "b.txt").write_text("good")
        found = rejections(corpus("text", tmp_path))
        assert (
            found["c/a.txt"].rule == Rule.UNDECODABLE and "not utf-8: invalid start byte at byte 2" in found["c/a.txt"].reason
        )
        replaced = documents(corpus("text", tmp_path, undecodable="replace"))
        assert replaced == {"c/a.txt": "ab\ufffd", "c/b.txt": "good"}

    def test_binary(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"a\0b")
        assert rejections(corpus("text", tmp_path))["c/a.txt"].rule == Rule.BINARY

    def test_unreadable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file that vanishes between listing and reading; permissions mean nothing to root, who may run this."""
        (tmp_path / "a.txt").write_text("a")
        (tmp_path / "b.txt").write_text("b")
        config = corpus("text", tmp_path)
        inputs = list_inputs(config)
        (tmp_path / "a.txt").unlink()
        items = list(read_unit(config, inputs.units[0], lambda count: None))
        assert isinstance(items[0], Rejection) and items[0].rule == Rule.UNREADABLE and "No such file" in items[0].reason
        assert isinstance(items[1], Document) and items[1].text == "b"

    def test_separator(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one\n\ntwo\n\n\n\nthree")
        found = documents(corpus("text", tmp_path, document_separator="\n\n"))
        assert list(found.values()) == ["one", "two", "three"] and len(found) == 3
        assert documents(corpus("text", tmp_path, document_separator="\\n\\n")) == found  # as a command line gives it

    def test_progress_counts_bytes_on_disk(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt.gz"
        path.write_bytes(gzip.compress(b"x" * 100_000))
        config, seen = corpus("text", tmp_path), []
        list(read_unit(config, list_inputs(config).units[0], seen.append))
        assert sum(seen) == path.stat().st_size


class TestBrokenArchives:
    @pytest.mark.parametrize("ending", [".gz", ".zst"])
    @pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
    def test_what_came_before_is_kept(self, tmp_path: Path, ending: str, damage: str) -> None:
        lines = "".join(json.dumps({"text": os.urandom(40).hex()}) + "\n" for _ in range(6000)).encode()
        content = bytearray(packed(lines, ending))
        if damage == "cut":
            content = content[: len(content) // 2]
        elif damage == "flipped":
            content[len(content) // 2] ^= 255
        else:
            content = bytearray(b"no archive at all")
        (tmp_path / f"a.jsonl{ending}").write_bytes(content)
        (tmp_path / "b.jsonl").write_text('{"text": "good"}\n')
        items = read_all(corpus("jsonl", tmp_path))
        broken = [item for item in items if isinstance(item, Rejection)]
        assert broken and broken[-1].rule == Rule.BROKEN_FILE and broken[-1].id == f"c/a.jsonl{ending}"
        assert isinstance(items[-1], Document) and items[-1].text == "good"
        if damage == "cut":
            assert len(items) > 2

    def test_zstd_frames_in_a_row(self, tmp_path: Path) -> None:
        path = tmp_path / "a.zst"
        path.write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
        with open_input(path) as file:
            assert file.read() == b"one two"
        path.write_bytes(b"")
        with open_input(path) as file:
            assert file.read() == b""


class TestJsonLines:
    def test_bad_lines_are_set_aside_one_by_one(self, tmp_path: Path) -> None:
        lines = [
            b'{"text": "one", "lang": "en", "tags": [1], "score": 0.5}',
            b'{"text": "cut',
            b"",
            b'["no object"]',
            b'{"body": "x", "id": 3}',
            b'{"text": null}',
            b'{"text": "\xff"}',
            b'{"text": "last"}',
        ]
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
        items = read_all(corpus("jsonl", tmp_path))
        good = [item for item in items if isinstance(item, Document)]
        assert [(item.id, item.text) for item in good] == [("c/a.jsonl:1", "one"), ("c/a.jsonl:8", "last")]
        assert good[0].metadata == {"lang": "en", "score": 0.5}
        assert {item.id: item.rule for item in items if isinstance(item, Rejection)} == {
            "c/a.jsonl:2": Rule.BAD_RECORD,
            "c/a.jsonl:4": Rule.BAD_RECORD,
            "c/a.jsonl:5": Rule.NO_TEXT,
            "c/a.jsonl:6": Rule.NO_TEXT,
            "c/a.jsonl:7": Rule.UNDECODABLE,
        }
        assert "no field text; it has body, id" in rejections(corpus("jsonl", tmp_path))["c/a.jsonl:5"].reason

    def test_other_text_field(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"content": "x"}')
        assert documents(corpus("jsonl", tmp_path, text_field="content")) == {"c/a.jsonl:1": "x"}


class TestParquet:
    def write(self, path: Path, values: list[str | None], column: str = "text") -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({column: values, "n": list(range(len(values)))}), path, row_group_size=7)

    def test_rows_across_row_groups(self, tmp_path: Path) -> None:
        self.write(tmp_path / "a.parquet", [f"row {number}" for number in range(20)])
        found = documents(corpus("parquet", tmp_path))
        assert found == {f"c/a.parquet:{number}": f"row {number}" for number in range(20)}

    def test_bad_input(self, tmp_path: Path) -> None:
        self.write(tmp_path / "a.parquet", ["x", None])
        self.write(tmp_path / "b.parquet", ["x"], column="body")
        (tmp_path / "c.parquet").write_bytes(b"PAR1 this is none PAR1")
        found = rejections(corpus("parquet", tmp_path))
        assert {name: item.rule for name, item in found.items()} == {
            "c/a.parquet:1": Rule.NO_TEXT,
            "c/b.parquet": Rule.NO_TEXT,
            "c/c.parquet": Rule.BROKEN_FILE,
        }
        assert "no column text; it has body, n" in found["c/b.parquet"].reason


class TestHuggingFace:
    @pytest.fixture(scope="class")
    def saved(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        import datasets

        folder = tmp_path_factory.mktemp("hf")
        rows = {"text": [f"row {number}" for number in range(10)], "n": list(range(10))}
        datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(str(folder / "saved"))
        (folder / "plain").mkdir()
        (folder / "plain" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows["text"]))
        return folder

    @pytest.mark.parametrize("kind", ["saved", "plain"])
    @pytest.mark.parametrize("streaming", [True, False])
    def test_rows(self, saved: Path, kind: str, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("data_pipeline.hub.ROWS_PER_UNIT", 4)
        config = corpus("hf", saved / kind, hf_streaming=streaming)
        assert len(list_inputs(config).units) == (1 if streaming else 3)
        assert list(documents(config).values()) == [f"row {number}" for number in range(10)]

    def test_what_cannot_be_opened(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"the data set .*nothing \(config None, split train\) cannot be opened"):
            list_inputs(corpus("hf", tmp_path / "nothing"))
