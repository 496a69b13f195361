"""Preparation from end to end: what comes out, interruptions, repetition, other settings, full disks, empty input."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline import prepare as prepare_module
from data_pipeline.config import CorpusConfig, PrepareConfig, TokenizerConfig
from data_pipeline.manifest import SPLITS, Manifest, read_manifest
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.workspace import locked, partial_folder
from tests.timeouts import scaled
from tests.unit.data_pipeline.corpora import prepared, settings, some_text, some_texts, write_jsonl


def decoded(manifest: Manifest) -> dict[str, list[str]]:
    """The documents of each split, from the shards' own bytes."""
    tokenizer = Tokenizer(manifest.tokenizer_path)
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for shard in manifest.shards:
        tokens = np.fromfile(manifest.folder / f"{shard.stem}.bin", dtype=manifest.dtype)
        assert tokens[-1] == manifest.eod_id
        for document in np.split(tokens, np.flatnonzero(tokens == manifest.eod_id)[:-1] + 1):
            texts[shard.split].append(tokenizer.backend.decode(document[:-1].tolist(), skip_special_tokens=False))
    return texts


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def funnel(manifest: Manifest) -> dict[str, int]:
    return {row.step: row.documents for row in manifest.funnel}


class TestResult:
    def test_every_document_is_somewhere(self, tmp_path: Path) -> None:
        texts = some_texts(120)
        lines = [*texts, texts[3], texts[7], texts[3], "", "a<|endoftext|>b"]
        manifest = prepared(tmp_path, lines)
        out = decoded(manifest)
        assert sorted(out["train"] + out["validation"]) == sorted([*texts, "a<|endoftext|>b"])
        assert funnel(manifest) == {
            "found": 125,
            "too_short": 1,
            "exact_duplicate": 3,
            "held out": len(out["validation"]),
            "train": len(out["train"]),
        }
        assert manifest.funnel[0].text_bytes == sum(row.text_bytes for row in manifest.funnel[1:])
        assert 3 < len(out["validation"]) < 30
        order = {text: number for number, text in reversed(list(enumerate(lines)))}  # the first of several copies counts
        assert [order[text] for text in out["train"]] == sorted(order[text] for text in out["train"])
        rejected = [json.loads(line) for line in (manifest.folder / "rejected.jsonl").read_text().splitlines()]
        assert {item["id"].rsplit(":")[-1]: item["reason"].rsplit("/")[-1] for item in rejected} == {
            "121": "texts.jsonl:4",
            "122": "texts.jsonl:8",
            "123": "texts.jsonl:4",
            "124": "0 bytes, min_document_bytes=1",
        }
        manifest.verify("full")
        assert not partial_folder(manifest.folder).exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts.jsonl"]

    def test_workers_do_not_change_a_byte(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = tmp_path / "texts"
        source.mkdir()
        for number, text in enumerate(some_texts(60)):
            (source / f"{number:03d}.txt").write_text(text)
        monkeypatch.setattr("data_pipeline.inputs.UNIT_BYTES_RANGE", (2000, 2000))
        results = []
        for workers in (1, 3):
            corpus = CorpusConfig(name="tiny", reader="text", paths=(str(source),))
            manifest = prepare(settings(source, tmp_path / f"out{workers}", corpus=corpus, workers=workers))
            assert manifest is not None
            content = content_of(manifest.folder)
            content.pop("manifest.json")  # names the output and the number of workers
            results.append(content)
        assert results[0] == results[1] and len(results[0]) > 8

    def test_duplicates_may_be_kept(self, tmp_path: Path) -> None:
        texts = some_texts(20)
        manifest = prepared(tmp_path, [*texts, *texts], deduplicate=False)
        out = decoded(manifest)
        assert len(out["train"]) + len(out["validation"]) == 40
        assert not set(out["train"]) & set(out["validation"])  # copies are never on both sides

    def test_existing_tokenizer(self, tiny: Manifest, tiny_second: Manifest) -> None:
        assert tiny_second.tokenizer_sha256 == tiny.tokenizer_sha256 and tiny_second.eod_id == tiny.eod_id
        assert (tiny_second.folder / "token_bytes.npy").read_bytes() == (tiny.folder / "token_bytes.npy").read_bytes()

    def test_large_vocabulary_is_stored_as_int32(self, tiny: Manifest, tmp_path: Path) -> None:
        """A tokenizer whose ids pass 65,535, made by adding a token far up."""
        folder = tmp_path / "wide"
        folder.mkdir()
        content = json.loads((tiny.tokenizer_path / "tokenizer.json").read_text())
        content["model"]["vocab"]["<far>"] = 70_000
        (folder / "tokenizer.json").write_text(json.dumps(content))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
        manifest = prepared(tmp_path, some_texts(20), tokenizer=TokenizerConfig(path=str(folder), engine="hf"))
        assert manifest.dtype == "int32" and manifest.vocab_size == 70_001
        assert sorted(sum(decoded(manifest).values(), [])) == sorted(some_texts(20))

    def test_a_separator_that_never_occurs(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "a.txt").write_text(some_text(0, 100))
        corpus = CorpusConfig(name="c", reader="text", paths=(str(tmp_path / "a.txt"),), document_separator="@@")
        manifest = prepare(settings(tmp_path, tmp_path / "out", corpus=corpus))
        assert manifest is not None and not manifest.shards_of("validation")
        printed = capsys.readouterr().out
        assert "no file holds corpus.document_separator='@@'" in printed and "no document was held out" in printed

    def test_half_a_surrogate_pair_is_set_aside(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "texts.jsonl", some_texts(10))
        path.write_text(path.read_text() + '{"text": "a\\ud83d"}\n')
        manifest = prepare(settings(path, tmp_path / "out"))
        assert manifest is not None and funnel(manifest)["undecodable"] == 1

    def test_text_says_what_comes_next(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        manifest = prepared(tmp_path, some_texts(30))
        printed = capsys.readouterr()
        for words in (
            "prepared tiny in",
            "held out",
            "bytes of text each",
            f"longhaul pretrain 'data.sources=[{{path: {manifest.folder}}}]'",
        ):
            assert words in printed.out
        assert "encoding:" in printed.err


class TestRepetition:
    def test_second_call_returns_at_once(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        manifest = prepared(tmp_path, some_texts(30))
        before = content_of(manifest.folder)
        start = time.perf_counter()
        again = prepare(settings(tmp_path / "texts.jsonl", tmp_path / "out", workers=2))
        assert time.perf_counter() - start < 0.5
        assert again == manifest and content_of(manifest.folder) == before
        assert "already prepared with these settings" in capsys.readouterr().out

    def test_other_settings_are_shown(self, tmp_path: Path) -> None:
        prepared(tmp_path, some_texts(30))
        changed = settings(tmp_path / "texts.jsonl", tmp_path / "out", seed=5, tokenizer=TokenizerConfig(vocab_size=301))
        with pytest.raises(UserError, match=r"seed=0 then, 5 now, tokenizer.vocab_size=300 then, 301 now. Give another output"):
            prepare(changed)

    def test_dry_run_writes_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_jsonl(tmp_path / "texts.jsonl", some_texts(5))
        assert prepare(settings(path, tmp_path / "out", dry_run=True)) is None
        assert list(tmp_path.iterdir()) == [path]
        assert "1 files" in (printed := capsys.readouterr().out) and "nothing was written" in printed

    def test_foreign_output(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "texts.jsonl", some_texts(5))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years of work")
        with pytest.raises(UserError, match="holds other files and no manifest.json"):
            prepare(settings(path, tmp_path / "out"))
        with pytest.raises(UserError, match="is a file; give a folder"):
            prepare(settings(path, tmp_path / "texts.jsonl"))
        assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"

    def test_an_empty_output_folder_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        assert prepared(tmp_path, some_texts(5)).folder == tmp_path / "out"


class TestInterruption:
    @pytest.fixture
    def small_units(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
        """40 files in about 20 units."""
        (tmp_path / "texts").mkdir()
        for number in range(40):
            (tmp_path / "texts" / f"{number:03d}.txt").write_text(some_text(number, 50))
        monkeypatch.setattr("data_pipeline.inputs.UNIT_BYTES_RANGE", (700, 700))
        corpus = CorpusConfig(name="tiny", reader="text", paths=(str(tmp_path / "texts"),))
        return settings(tmp_path, tmp_path / "out", corpus=corpus)

    @pytest.mark.parametrize("where", ["read_step", "encode_step", "write_shards", "train_tokenizer", "choose_engine"])
    def test_goes_on_where_it_stopped(self, small_units: PrepareConfig, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = prepare(dataclasses.replace(small_units, output=f"{small_units.output}-whole"))
        assert whole is not None
        original = getattr(prepare_module, where)
        calls = 0

        def count(*given: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise KeyboardInterrupt
            return original(*given, **named)

        stop_at = {"read_step": 5, "encode_step": 5}.get(where, 1)
        monkeypatch.setattr(prepare_module, where, count)
        with pytest.raises(KeyboardInterrupt):
            prepare(small_units)
        assert not small_units.output_folder.exists()
        assert prepare(small_units) is not None
        if where in ("read_step", "encode_step"):
            total = len(list((whole.folder.parent / "texts").iterdir()))
            assert 5 < calls <= total + 1  # four were done and were not done again, the fifth was
        first, second = content_of(whole.folder), content_of(small_units.output_folder)
        del first["manifest.json"], second["manifest.json"]
        assert first == second

    def test_killed_process(self, tmp_path: Path) -> None:
        """SIGKILL in the middle, several processes: no worker stays, and the same command finishes the work."""
        (tmp_path / "texts").mkdir()
        for number in range(200):
            (tmp_path / "texts" / f"{number:03d}.txt").write_text(some_text(number, 2000))
        script = tmp_path / "run.py"
        script.write_text(
            "import data_pipeline.inputs\n"
            "data_pipeline.inputs.UNIT_BYTES_RANGE = (200_000, 200_000)\n"
            "from pathlib import Path\n"
            "from data_pipeline.config import CorpusConfig\n"
            "from data_pipeline.prepare import prepare\n"
            "from tests.unit.data_pipeline.corpora import settings\n"
            "if __name__ == '__main__':\n"
            f"    corpus = CorpusConfig(name='tiny', reader='text', paths=({str(tmp_path / 'texts')!r},))\n"
            f"    prepare(settings(Path('.'), Path({str(tmp_path / 'out')!r}), corpus=corpus, workers=2))\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(prepare_module.__file__).parents[1])}
        process = subprocess.Popen(
            [sys.executable, str(script)], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
        )
        documents = tmp_path / "out.partial" / "documents"
        deadline = time.monotonic() + scaled(30)
        while time.monotonic() < deadline and len(list(documents.glob("0*.json"))) < 3:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + scaled(10)
        while time.monotonic() < deadline and _members(process.pid):
            time.sleep(0.05)
        assert not _members(process.pid)
        assert not (tmp_path / "out").exists()
        subprocess.run([sys.executable, str(script)], env=environment, check=True, capture_output=True)
        manifest = read_manifest(tmp_path / "out")
        manifest.verify("full")
        assert funnel(manifest)["found"] == 200

    def test_unfinished_work_with_other_settings_or_input(
        self, small_units: PrepareConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(*given: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(prepare_module, "choose", stop)
            prepare(small_units)
        with pytest.raises(UserError, match=r"out.partial: holds an unfinished preparation .*deduplicate=True then, False now"):
            prepare(dataclasses.replace(small_units, deduplicate=False))
        (Path(small_units.corpus.paths[0]) / "new.txt").write_text("new")
        with pytest.raises(UserError, match="files were added, removed or changed since it began. Remove the folder"):
            prepare(small_units)

    def test_two_at_once(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "texts.jsonl", some_texts(5))
        with (
            locked(tmp_path / "out"),
            pytest.raises(UserError, match=f"another preparation is at work on it .process {os.getpid()} on"),
        ):
            prepare(settings(path, tmp_path / "out"))
        assert prepare(settings(path, tmp_path / "out")) is not None

    def test_a_worker_that_is_killed(self, small_units: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(prepare_module, "read_step", die)
        with pytest.raises(UserError, match="a worker process was killed from outside, most likely because memory ran out"):
            prepare(dataclasses.replace(small_units, workers=2))


def die(task: object, advance: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _members(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


class TestNothingToPrepare:
    def test_all_files_fail(self, tmp_path: Path) -> None:
        for number in range(3):
            (tmp_path / f"{number}.txt").write_bytes(b"\xff\xfe\xfd")
        config = settings(tmp_path, tmp_path / "out", corpus=CorpusConfig(name="c", reader="text", paths=(str(tmp_path),)))
        with pytest.raises(
            UserError, match=r"corpus c: not one document could be used \(3 undecodable\), for example: .*0.txt: not utf-8"
        ):
            prepare(config)

    def test_empty_file(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "texts.jsonl", [])
        with pytest.raises(
            UserError, match=r"not one document could be used \(none found\), for example: the files hold no document"
        ):
            prepare(settings(path, tmp_path / "out"))

    def test_missing_input(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="gone.jsonl: no such file or folder"):
            prepare(settings(tmp_path / "gone.jsonl", tmp_path / "out"))

    def test_all_held_out(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "texts.jsonl", some_texts(3))
        with pytest.raises(UserError, match="all 3 documents would be held out and none is left to train on; lower it"):
            prepare(settings(path, tmp_path / "out", held_out_fraction=0.999999))

    def test_tokenizer_is_checked_before_the_reading(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_jsonl(tmp_path / "texts.jsonl", some_texts(3))
        with pytest.raises(UserError, match="tokenizer.path=.*nothing: no such folder"):
            prepare(settings(path, tmp_path / "out", tokenizer=TokenizerConfig(path=str(tmp_path / "nothing"))))
        monkeypatch.setattr("data_pipeline.workspace.importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match="engine=gigatoken: it is not installed"):
            prepare(settings(path, tmp_path / "out", tokenizer=TokenizerConfig(engine="gigatoken")))
        assert list(tmp_path.iterdir()) == [path]


class TestFullDisk:
    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        """A disk of 2 MB. Needs the right to mount."""
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        yield folder
        subprocess.run(["umount", str(folder)], check=True)

    def incompressible(self, folder: Path, megabytes: int) -> Path:
        """Text that zstd cannot make much smaller."""
        rng = np.random.default_rng(0)
        texts = [rng.bytes(22_000).hex(" ", 3) for _ in range(20 * megabytes)]
        return write_jsonl(folder / "texts.jsonl", texts)

    def test_certainly_too_little_room(self, tmp_path: Path, small_disk: Path) -> None:
        path = self.incompressible(tmp_path, 10)
        with pytest.raises(UserError, match=r"2.1 MB are free in .*disk, at least 2.\d MB are needed"):
            prepare(settings(path, small_disk / "out"))

    def test_the_disk_fills_while_writing(self, tmp_path: Path, small_disk: Path) -> None:
        old = prepared(small_disk / "old", some_texts(20))
        path = self.incompressible(tmp_path, 3)
        config = settings(path, small_disk / "out")
        with pytest.raises(
            UserError, match=r"out: no space left on device; .* are free, about 4.\d MB are needed in all. Make room"
        ):
            prepare(config)
        assert not (small_disk / "out").exists()
        old.verify("full")
        subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
        manifest = prepare(config)  # the same command again, with room
        assert manifest is not None and manifest.num_documents("train") > 40
        manifest.verify("full")

    def test_no_right_to_write(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_jsonl(tmp_path / "texts.jsonl", some_texts(3))
        monkeypatch.setattr("data_pipeline.workspace.os.access", lambda *given: False)
        with pytest.raises(UserError, match="cannot be written to; give another output=FOLDER"):
            prepare(settings(path, tmp_path / "out"))
