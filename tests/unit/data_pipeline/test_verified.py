"""Hashed once and remembered: what a second start reads, which changes are seen, and records that are of no use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conf.errors import UserError
from data_pipeline import verified
from data_pipeline.config import DataConfig, SourceConfig, Verify
from data_pipeline.facts import inspect_sources, verify_sources
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.verified import RECORD_FILE
from tests.unit.data_pipeline.corpora import change_manifest

SHARD = "train-00000.bin"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files whose content was read for their hash."""
    names: list[str] = []
    original = verified.sha256_of

    def counted(path: Path, progress: Callable[[int], object]) -> str:
        names.append(path.name)
        return original(path, progress)

    monkeypatch.setattr(verified, "sha256_of", counted)
    yield names


@pytest.fixture
def remembered(own_copy: Path) -> Path:
    """A corpus that was verified once."""
    check(own_copy)
    return own_copy


def check(folder: Path, verify: Verify = "once", *, run_dir: Path | None = None) -> None:
    """As a start does."""
    config = DataConfig(sources=(SourceConfig(path=str(folder)),), sequence_length=32, verify=verify)
    verify_sources(config, inspect_sources(config).manifests, run_dir=run_dir)


def flip(path: Path) -> None:
    """Another byte in the same file, and its times as they were."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (before.st_size, before.st_mtime_ns, before.st_ino) == (after.st_size, after.st_mtime_ns, after.st_ino)


def later(path: Path) -> None:
    """The same content, as of a second later."""
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


def exchange(path: Path) -> None:
    """The same content, size and times under another inode: what rsync --times leaves."""
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)


def test_a_second_start_opens_no_shard(own_copy: Path) -> None:
    """Counted by the interpreter, in a process of its own."""
    script = f"""
import sys
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
from pathlib import Path
from tests.unit.data_pipeline.test_verified import check
del opened[:]
check(Path({str(own_copy)!r}))
print(*sorted(Path(path).name for path in opened if path.startswith({str(own_copy)!r})))
"""

    def opened() -> list[str]:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        return [name for name in done.stdout.split() if not name.endswith(".tmp") and name != own_copy.name]

    listed = sorted(Path(file.name).name for file in read_manifest(own_copy).files)
    assert opened() == sorted([*listed, "manifest.json", RECORD_FILE]), "each of them once"
    assert opened() == ["manifest.json", RECORD_FILE]


def test_every_file_is_hashed_once(own_copy: Path, hashed: list[str]) -> None:
    listed = sorted(Path(file.name).name for file in read_manifest(own_copy).files)
    check(own_copy)
    assert sorted(hashed) == listed
    check(own_copy)
    check(own_copy, "sizes")
    assert len(hashed) == len(listed)
    check(own_copy, "full")
    assert len(hashed) == 2 * len(listed)


@pytest.mark.parametrize("touch", [later, exchange])
def test_a_file_with_another_time_or_inode_is_hashed_again(
    remembered: Path, hashed: list[str], touch: Callable[[Path], None]
) -> None:
    shard = remembered / SHARD
    touch(shard)
    check(remembered)
    check(remembered)
    assert hashed == [SHARD], "of the same content, so it is remembered as it is now"
    flip(shard)
    touch(shard)
    for _ in range(2):
        with pytest.raises(UserError, match=f"{SHARD}: its content has changed: SHA-256 differs"):
            check(remembered)


def test_a_change_that_leaves_no_trace_is_found_in_full(remembered: Path, hashed: list[str]) -> None:
    whole = (remembered / SHARD).read_bytes()
    flip(remembered / SHARD)
    check(remembered)
    assert hashed == [], "which is what remembering means"
    with pytest.raises(UserError, match=f"{SHARD}: its content has changed: SHA-256 differs .*longhaul prepare"):
        check(remembered, "full")
    with pytest.raises(UserError, match=SHARD):
        check(remembered)  # nothing vouches for it any more
    del hashed[:]
    (remembered / SHARD).write_bytes(whole)
    check(remembered)
    assert hashed == [SHARD], "the others are as sound as before"


def test_a_part_is_remembered_beside_the_rest(own_copy: Path, hashed: list[str]) -> None:
    manifest = read_manifest(own_copy)
    manifest.verify("once", split="validation")
    held_out = sorted(file.name for shard in manifest.shards_of("validation") for file in shard.files)
    assert sorted(hashed) == held_out
    check(own_copy)
    assert len(hashed) == len(manifest.files)
    manifest.verify("once", split="validation")
    manifest.verify("once", split="train")
    assert len(hashed) == len(manifest.files)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: "",
        lambda content: json.dumps(content)[:-9],
        lambda content: "[]",
        lambda content: json.dumps(content | {"format_version": 2}),
        lambda content: json.dumps(content | {"list_sha256": "0" * 64}),
        lambda content: json.dumps(content | {"files": [1]}),
        lambda content: json.dumps(content | {"files": {SHARD: [1]}}),
        lambda content: json.dumps({"format_version": 1}),
        lambda content: "[" * 100_000,
    ],
)
def test_a_record_that_is_damaged_is_passed_over(remembered: Path, change: Callable[[dict], str]) -> None:
    record = remembered / RECORD_FILE
    before = record.read_bytes()
    record.write_text(change(json.loads(before)))
    flip(remembered / SHARD)
    with pytest.raises(UserError, match=SHARD):
        check(remembered)
    flip(remembered / SHARD)  # back again
    check(remembered)
    assert record.read_bytes() == before


def test_a_record_of_another_manifest_is_passed_over(remembered: Path, hashed: list[str]) -> None:
    change_manifest(remembered, name="renamed")
    check(remembered)
    assert len(hashed) == len(read_manifest(remembered).files)


def test_a_copy_of_the_corpus_is_hashed(remembered: Path, tmp_path: Path, hashed: list[str]) -> None:
    shutil.copytree(remembered, tmp_path / "elsewhere")
    check(tmp_path / "elsewhere")
    assert len(hashed) == len(read_manifest(remembered).files)


def refuse_below(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Let no record be written into these, as of a file system that is mounted for reading; root may write anywhere else."""
    original = verified.write_json

    def write(path: Path, value: object) -> None:
        if path.parent in folders:
            raise OSError(30, "Read-only file system", str(path))
        original(path, value)

    monkeypatch.setattr(verified, "write_json", write)


def test_where_the_corpus_cannot_be_written_to_the_run_remembers(
    own_copy: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "runs" / "first"
    with monkeypatch.context() as patch:
        refuse_below(patch, own_copy)
        flip(own_copy / SHARD)
        with pytest.raises(UserError, match=SHARD):
            check(own_copy, run_dir=run_dir)
        assert not run_dir.exists(), "a start that is refused leaves nothing"
        flip(own_copy / SHARD)
        check(own_copy, run_dir=run_dir)
        (record,) = run_dir.iterdir()
        assert record.name.startswith("verified-") and not (own_copy / RECORD_FILE).exists()
        del hashed[:]
        check(own_copy, run_dir=run_dir)
        assert (hashed, capsys.readouterr().err) == ([], "")
        flip(own_copy / SHARD)
        with pytest.raises(UserError, match=SHARD):
            check(own_copy, "full", run_dir=run_dir)
        with pytest.raises(UserError, match=SHARD):
            check(own_copy, run_dir=run_dir)
    flip(own_copy / SHARD)
    later(own_copy / SHARD)
    check(own_copy, run_dir=run_dir)
    assert (own_copy / RECORD_FILE).exists(), "and the corpus again where it can be"
    del hashed[:]
    check(own_copy, run_dir=run_dir)
    assert hashed == [], "though the run's record is older"


def test_where_nothing_can_be_written_it_is_told(
    own_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_below(monkeypatch, own_copy, tmp_path / "run")
    check(own_copy, run_dir=tmp_path / "run")
    told = capsys.readouterr().err
    assert told.count("cannot be written (Read-only file system), nothing is remembered there") == 2
    monkeypatch.undo()
    check(own_copy)
    refuse_below(monkeypatch, own_copy)
    flip(own_copy / SHARD)
    with pytest.raises(UserError, match=SHARD):
        check(own_copy, "full")
    record = own_copy / RECORD_FILE
    assert f"note: {record}: cannot be written (Read-only file system), still takes damaged files" in capsys.readouterr().err


def test_a_file_that_cannot_be_read(own_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, progress: object) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(verified, "sha256_of", fail)
    with pytest.raises(UserError, match=rf"{SHARD}: cannot be read \(Input/output error\), though manifest.json lists it"):
        check(own_copy)


def test_two_starts_at_once(own_copy: Path, tiny: Manifest) -> None:
    """Three processes that verify the same corpus again and again: each finds it sound, and leaves a record that is whole."""
    script = f"""
import sys
from pathlib import Path
from tests.unit.data_pipeline.test_verified import check
for _ in range(10):
    check(Path({str(own_copy)!r}), "full")
"""
    starts = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) for _ in range(3)]
    assert [(start.communicate()[1], start.returncode) for start in starts] == [(b"", 0)] * 3
    assert len(json.loads((own_copy / RECORD_FILE).read_bytes())["files"]) == len(tiny.files)
    assert not list(own_copy.glob(".*.tmp"))


def test_much_is_told(own_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verified, "TOLD_FROM_BYTES", 1)
    check(own_copy)
    check(own_copy)
    assert capsys.readouterr().err.count(f"of {own_copy} (verify=once)") == 1
