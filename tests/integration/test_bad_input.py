"""Bad input through the real command line: one clear message, a non-zero exit, no traceback, nothing written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.runs import WORDS

REFUSED = 93


def longhaul(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "tools.cli", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def refused(result: subprocess.CompletedProcess[str], *expected: str) -> None:
    """The command ended as refused, and its one message names all of `expected`."""
    said = result.stdout + result.stderr
    assert result.returncode == REFUSED, said
    assert "Traceback" not in said
    for text in expected:
        assert text in result.stderr, result.stderr


def pretrain(corpus: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return longhaul("pretrain", *WORDS, f"data.sources=[{{path: {corpus}}}]", "run.name=bad", *words, folder=folder)


@pytest.fixture
def copied(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the prepared corpus that may be damaged."""
    return Path(shutil.copytree(corpus, tmp_path / "corpus"))


@pytest.fixture(scope="module")
def stopped(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the working directory of a run that stopped after its first checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    result = pretrain(corpus, folder, "budget.stop_at_step=5")
    assert result.returncode == 85, result.stderr
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"this machine does not let a test mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optim.lrr=1"], ["optim.lrr", "optim.lr"]),
        (["batch.sequences=-8"], ["batch.sequences=-8", "at least 1"]),
        (["parallel.zero=0"], ["parallel.zero=0", "use zero=1"]),
        (["batch.sequences=6", "batch.micro_batch=4"], ["batch.micro_batch=4", "batch.sequences=6"]),
        (["data.sources=[{path: nowhere}]"], ["nowhere", "longhaul prepare"]),
        (["model.vocab_size=100"], ["model.vocab_size=100", "300"]),
        (["launch.processes=3"], ["batch.sequences", "3 data-parallel ranks"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_settings_are_refused_before_anything_is_written(
    corpus: Path, tmp_path: Path, words: list[str], expected: list[str]
) -> None:
    refused(pretrain(corpus, tmp_path, *words), *expected)
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_byte_in_a_shard(copied: Path, tmp_path: Path) -> None:
    shard = copied / "train-00000.bin"
    flip_byte(shard)
    refused(pretrain(copied, tmp_path), str(shard))
    assert not (tmp_path / "runs").exists()


def test_a_cut_shard(copied: Path, tmp_path: Path) -> None:
    shard = copied / "train-00000.bin"
    os.truncate(shard, shard.stat().st_size - 2)
    refused(pretrain(copied, tmp_path, "data.verify=sizes"), str(shard))
    assert not (tmp_path / "runs").exists()


def test_a_token_id_beyond_the_vocabulary(copied: Path, tmp_path: Path) -> None:
    shard = copied / "train-00000.bin"
    shard.write_bytes(b"\xff\x7f" * (shard.stat().st_size // 2))  # ids of 32,767; the size is that of the manifest
    result = pretrain(copied, tmp_path, "data.verify=sizes")
    refused(result, "32767", "train-00000")
    assert not list((tmp_path / "runs/bad/checkpoints").iterdir())


@pytest.mark.parametrize("words", [["model.num_layers=3"], ["run.seed=5"], ["model=llama_tiny"]], ids=lambda words: words[0])
def test_a_checkpoint_of_another_model(corpus: Path, stopped: Path, words: list[str]) -> None:
    before = sorted(path for path in stopped.rglob("*"))
    result = pretrain(corpus, stopped, *words)
    refused(result, "step-00000005", "another run.name")
    assert sorted(path for path in stopped.rglob("*")) == before


def test_a_flipped_byte_in_a_checkpoint(corpus: Path, stopped: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "copy"))
    weights = folder / "runs/bad/checkpoints/step-00000005/rank-00000.safetensors"
    flip_byte(weights)
    refused(pretrain(corpus, folder), weights.name, "SHA-256")
    assert [path.name for path in (folder / "runs/bad/checkpoints").iterdir()] == ["step-00000005"]
    refused(longhaul("export", "checkpoint=runs/bad", "out=model", folder=folder), weights.name)
    assert not list(folder.glob("model*"))


@pytest.mark.parametrize("verb", ["generate", "export"])
def test_a_folder_that_is_no_checkpoint(tmp_path: Path, verb: str) -> None:
    words = {"generate": ["prompt=x"], "export": ["out=model"]}[verb]
    refused(longhaul(verb, "checkpoint=nowhere", *words, folder=tmp_path), "nowhere", "no such folder")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_during_a_save(corpus: Path, tmp_path: Path, small_disk: Path) -> None:
    result = pretrain(corpus, tmp_path, "model.hidden_size=128", f"run.folder={small_disk}", "budget.stop_at_step=5")
    refused(result, str(small_disk), "MiB free")
    assert not list((small_disk / "bad").glob("checkpoints/*")), "half a checkpoint would keep the disk full"


def test_a_full_disk_during_preparation(tmp_path: Path, small_disk: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"{number} words of many kinds\n" * 5000)
    words = ["corpus=text", f"corpus.paths=[{text}]", "tokenizer.vocab_size=300", f"output={small_disk}/out"]
    result = longhaul("prepare", *words, folder=tmp_path)
    refused(result, str(small_disk))
    assert not (small_disk / "out" / "manifest.json").exists()


def test_an_unreadable_file_is_counted_and_set_aside(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(30):
        (text / f"{number}.txt").write_text(f"document number {number} " * 40)
    (text / "broken.txt").write_bytes(b"\xff\xfe\x00 no text")
    (text / "gone.txt").symlink_to("nowhere")
    words = ["corpus=text", f"corpus.paths=[{text}]", "tokenizer.vocab_size=300", "held_out_fraction=0.1", "output=out"]
    result = longhaul("prepare", *words, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert "broken.txt" in rejected
    assert "gone.txt" in rejected
