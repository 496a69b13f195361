"""Documents as token runs, of a prepared corpus and of files that are encoded now; and what cannot be read so."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zstandard

from conf.errors import UserError
from data_pipeline.corpus import Corpus
from data_pipeline.io import read_json_lines
from data_pipeline.manifest import read_manifest
from data_pipeline.task_config import TaskConfig, TaskSource
from data_pipeline.texts import TextSource, TokenRun, open_texts
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from tests.unit.data_pipeline.corpora import prepared, some_texts
from tests.unit.data_pipeline.test_tasks import parquet

END = 0


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return Tokenizer(corpus / "tokenizer")


def opened(path: Path | str, tokenizer: Tokenizer, *, end: int | None = END, **changes: object) -> TextSource:
    task = TaskConfig(**changes)  # type: ignore[arg-type]
    return open_texts(task, TaskSource(path=str(path)), tokenizer=tokenizer, end_of_document=end)


def runs(path: Path | str, tokenizer: Tokenizer, *, limit: int | None = None, **changes: object) -> list[TokenRun]:
    return list(opened(path, tokenizer, **changes).runs(limit))  # type: ignore[arg-type]


def texts(path: Path | str, tokenizer: Tokenizer, **changes: object) -> list[str]:
    return [tokenizer.decode(run.tokens.tolist()) for run in runs(path, tokenizer, **changes)]


class TestCorpus:
    def test_its_documents_are_its_tokens(self, corpus: Path, tokenizer: Tokenizer) -> None:
        split = Corpus(corpus, "validation")
        found = runs(corpus, tokenizer)
        together = np.concatenate([run.tokens for run in found])
        assert together.dtype == np.int32 and np.array_equal(together, split.read(0, split.num_tokens))
        assert all(run.tokens[-1] == split.eod_id and (run.tokens[:-1] != split.eod_id).all() for run in found)
        ids = [
            name
            for shard in split.manifest.shards_of("validation")
            for name in read_json_lines(corpus / f"{shard.stem}.ids.jsonl")
        ]
        assert [run.id for run in found] == ids and {run.source for run in found} == {corpus.name}

    def test_without_the_marks_of_their_ends(self, corpus: Path, tokenizer: Tokenizer) -> None:
        with_marks, without = runs(corpus, tokenizer), runs(corpus, tokenizer, end_of_document=False)
        assert all(np.array_equal(one.tokens[:-1], other.tokens) for one, other in zip(with_marks, without, strict=True))
        assert opened(corpus, tokenizer).hash != opened(corpus, tokenizer, end_of_document=False).hash, "other targets"

    def test_the_split_and_the_limit(self, corpus: Path, tokenizer: Tokenizer) -> None:
        train, held_out = runs(corpus, tokenizer, split="train"), runs(corpus, tokenizer)
        assert len(train) > len(held_out) > 20 and not {run.id for run in train} & {run.id for run in held_out}
        assert [run.id for run in runs(corpus, tokenizer, split="train", limit=3)] == [run.id for run in train[:3]]
        assert opened(corpus, tokenizer).hash != opened(corpus, tokenizer, split="train").hash

    def test_another_tokenizer(self, corpus: Path, tmp_path: Path) -> None:
        from data_pipeline.config import TokenizerConfig

        train_tokenizer(TokenizerConfig(vocab_size=280), ["other words"], tmp_path / "other")
        with pytest.raises(UserError, match="was encoded by another tokenizer than the model's.*tokenizer.path=.*other"):
            opened(corpus, Tokenizer(tmp_path / "other"))

    def test_without_held_out_text(self, tmp_path: Path) -> None:
        manifest = prepared(tmp_path, some_texts(30), held_out_fraction=0.0)
        tokenizer = Tokenizer(manifest.folder / "tokenizer")
        with pytest.raises(
            UserError, match="has no validation text; prepare it with held_out_fraction above 0, or give split=train"
        ):
            opened(manifest.folder, tokenizer)
        assert len(runs(manifest.folder, tokenizer, split="train")) == 30

    def test_a_damaged_one(self, corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(corpus, tmp_path / "copy"))
        shard = copy / f"{read_manifest(copy).shards_of('validation')[0].stem}.bin"
        content = bytearray(shard.read_bytes())
        content[100] ^= 1
        shard.write_bytes(content)
        with pytest.raises(UserError, match=rf"{shard.name}: its content has changed: SHA-256 differs"):
            opened(copy, tokenizer)
        assert opened(copy, tokenizer, split="train").hash
        task, source = TaskConfig(), TaskSource(path=str(copy))
        assert open_texts(task, source, tokenizer=tokenizer, end_of_document=END, verify=False).hash
        shard.write_bytes(content[:60])
        with pytest.raises(UserError, match=rf"{shard.name}: holds 60 bytes, manifest.json says"):
            opened(copy, tokenizer)
        (copy / "manifest.json").write_text("{")
        with pytest.raises(UserError, match="manifest.json"):
            opened(copy, tokenizer)

    def test_one_that_lacks_a_file(self, corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(corpus, tmp_path / "copy"))
        stem = read_manifest(copy).shards_of("validation")[0].stem
        (copy / f"{stem}.ids.jsonl").unlink()
        with pytest.raises(UserError, match=r"ids.jsonl: "):
            runs(copy, tokenizer)


class TestFiles:
    @pytest.mark.parametrize(
        "text", ["one\r\ntwo\n\n", "\u4f60\u597d\uff0c\u4e16\u754c", "\u041f\u0440\u0438\u0432\u0435\u0442", "a<|endoftext|>b"]
    )
    @pytest.mark.parametrize(("ending", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)])
    def test_a_text_file_is_one_document(
        self, tmp_path: Path, tokenizer: Tokenizer, text: str, ending: str, pack: type
    ) -> None:
        path = tmp_path / f"a.txt{ending}"
        path.write_bytes(pack(text.encode()))
        (run,) = runs(path, tokenizer)
        assert run.tokens.tolist() == [*tokenizer.encode(text), END] and run.tokens.dtype == np.int32
        assert tokenizer.decode(run.tokens.tolist()) == text and (run.tokens[:-1] != END).all(), "no text spells the end"
        assert run.source == path.name and run.id.endswith(path.name)

    def test_without_the_mark_of_its_end(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        (tmp_path / "a.txt").write_text("some words")
        (run,) = runs(tmp_path / "a.txt", tokenizer, end_of_document=False)
        assert run.tokens.tolist() == tokenizer.encode("some words")

    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        (tmp_path / "a.txt").write_bytes("\ufeffa".encode())
        assert texts(tmp_path / "a.txt", tokenizer) == ["a"]

    def test_a_tokenizer_without_an_end(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        (tmp_path / "a.txt").write_text("some words")
        assert runs(tmp_path / "a.txt", tokenizer, end=None)[0].tokens.tolist() == tokenizer.encode("some words")

    @pytest.mark.parametrize("ending", [".jsonl", ".ndjson.gz"])
    def test_json_lines(self, tmp_path: Path, tokenizer: Tokenizer, ending: str) -> None:
        content = "\n".join(json.dumps({"body": text, "n": 3}) for text in ("a", "\u00e9", "c")).encode()
        path = tmp_path / f"a{ending}"
        path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
        assert texts(path, tokenizer, text_field="body") == ["a", "\u00e9", "c"]
        assert texts(path, tokenizer, text_field="body", limit=2) == ["a", "\u00e9"]
        with pytest.raises(UserError, match=r":1: no field text; it has body, n; mend or leave out"):
            runs(path, tokenizer)

    def test_parquet(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        assert texts(parquet(tmp_path / "a.parquet", {"text": ["a", "b", "c"]}), tokenizer) == ["a", "b", "c"]

    def test_patterns_and_folders(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        for name in ("v1.2/b.txt", "v1.2/a.md", "v1.2/c.bin", "v1.2/deep/d.txt", "v1.2/e.jsonl"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("l") else name)
        assert texts(tmp_path / "v1.2", tokenizer) == ["v1.2/a.md", "v1.2/b.txt", "v1.2/deep/d.txt"]
        assert texts(tmp_path / "v1.2/*.txt", tokenizer) == ["v1.2/b.txt"]
        assert texts(tmp_path / "v1.2/*.jsonl", tokenizer) == ["v1.2/e.jsonl"]

    def test_the_hash_follows_the_content(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        (tmp_path / "a.txt").write_text("one")
        before = opened(tmp_path, tokenizer).hash
        assert opened(tmp_path / "a.txt", tokenizer).hash == before
        (tmp_path / "a.txt").write_text("two")
        assert opened(tmp_path, tokenizer).hash != before


class TestWhatIsRefused:
    @pytest.mark.parametrize("name", ["gone.txt", "gone", "gone/*.txt"])
    def test_what_is_not_there(self, tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
        with pytest.raises(UserError, match=r"task.data: .*gone.*: no such corpus, file or pattern.*\.jsonl"):
            opened(tmp_path / name, tokenizer)

    def test_a_folder_without_texts(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        (tmp_path / "a.jsonl").write_text("{}")
        with pytest.raises(UserError, match=r"no text file in it .*others by a pattern: FOLDER/\*.jsonl"):
            opened(tmp_path, tokenizer)

    @pytest.mark.parametrize("name", ["a.bin", "a.idx", "a.safetensors", "a.json", "a.csv", "a.TSV", "a.csv.gz"])
    def test_files_without_running_text(self, tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
        (tmp_path / name).write_text("x")
        with pytest.raises(UserError, match=r"holds no running text; give a prepared corpus, .txt"):
            opened(tmp_path / name, tokenizer)

    def test_the_folder_of_a_tokenizer(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(UserError, match="is the folder of a model or a tokenizer"):
            opened(tokenizer.folder, tokenizer)

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("a.txt", b"ab\xff", "not utf-8: invalid start byte at byte 2"),
            ("a.txt", b"PAR1\0\0", "holds NUL bytes"),
            ("a.txt.gz", b"no archive", "Not a gzipped file"),
            ("a.txt.zst", b"no archive", "broken zstd data"),
            ("a.jsonl", b'{"text": "a"}\n{"text":\n', ":2: not JSON"),
            ("a.jsonl", b'["a"]\n', ":1: not a JSON object but list"),
            ("a.jsonl", b'{"text": 3}\n', ":1: field text holds int, not text"),
            ("a.parquet", b"{}", "a.parquet"),
        ],
    )
    def test_what_cannot_be_read(self, tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes, expected: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=expected) as caught:
            runs(tmp_path / name, tokenizer)
        assert "mend or leave out what cannot be read" in str(caught.value) and name in str(caught.value)

    def test_a_link_that_leads_nowhere(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        (tmp_path / "a.txt").write_text("a")
        (tmp_path / "b.txt").symlink_to(tmp_path / "nothing")
        with pytest.raises(UserError, match=r"b.txt: .*No such file"):
            runs(tmp_path, tokenizer)
