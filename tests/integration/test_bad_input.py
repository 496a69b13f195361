"""Bad input through the real command line: one clear message, a non-zero exit, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import longhaul
from tests.integration.runs import WORDS
from tests.unit.data_pipeline.corpora import prepared, some_texts
from train.launch import visible_gpus

REFUSED = 93


def refused(result: subprocess.CompletedProcess[str], *expected: str) -> None:
    """The command ended as refused, and the message that it ends with is short and names all of `expected`."""
    said = result.stdout + result.stderr
    assert result.returncode == REFUSED, said
    assert "Traceback" not in said
    lines = [line for line in result.stderr.splitlines() if line.startswith(("longhaul", "  - "))]
    assert 1 <= len(lines) <= 8, result.stderr
    for text in expected:
        assert text in "\n".join(lines), result.stderr


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Name, size and time of everything in a folder, so that whatever was written shows."""
    found = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


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
        (["model=gpt3"], ["model=gpt3: no such option", "gpt2_124m"]),
        (["optim.lr=nan"], ["optim.lr=nan: must be a finite number"]),
        (["optim.lr=1e-3,3e-3"], ["optim.lr=1e-3,3e-3: several values need -m"]),
        (["data.sequence_length=100000", "model.max_positions=100000"], ["no sample of data.sequence_length=100000"]),
        (["data.max_epochs=0.001"], ["data.max_epochs=0.001: the run reads"]),
        (["--config-dir=nowhere"], ["--config-dir=nowhere: no such folder"]),
        (["run.folder=/dev/null"], ["/dev/null/bad", "cannot be read (Not a directory); check run.folder"]),
        (
            ["optim.lrr=1", "batch.sequences=-8", "parallel.zero=0", "precision=fp16"],
            ["4 problems", "optim.lrr", "batch.sequences=-8", "zero=1", "precision=fp16: must be auto, bf16, fp32 or fp8"],
        ),
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
    refused(result, "train-00000.bin, token", "of train: token id 32767 is beyond model.vocab_size=300", "data.verify=full")
    assert "run refused" in result.stdout + result.stderr and "run crashed" not in result.stdout + result.stderr
    assert not list((tmp_path / "runs/bad/checkpoints").iterdir())


@pytest.mark.skipif(visible_gpus() > 0, reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(corpus: Path, tmp_path: Path) -> None:
    words = [*WORDS, f"data.sources=[{{path: {corpus}}}]", "launch.device=cuda"]
    refused(longhaul("pretrain", *words, folder=tmp_path), "launch.device=cuda: no NVIDIA GPU", "use launch.device=cpu")
    planned = longhaul("plan", *words, "launch.processes=4", "batch.ramp_start=8", folder=tmp_path)
    assert planned.returncode == 0, "a plan is made for another machine"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("finished", [False, True], ids=["stopped", "finished"])
@pytest.mark.parametrize("words", [["model.num_layers=3"], ["run.seed=5"], ["model=llama_tiny"]], ids=lambda words: words[0])
def test_a_checkpoint_of_another_model(corpus: Path, stopped: Path, tmp_path: Path, words: list[str], finished: bool) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "copy"))
    if finished:
        (folder / "runs/bad/FINISHED").write_text('{"step": 16}\n')
    before = snapshot(folder)
    refused(pretrain(corpus, folder, *words), "step-00000005 was trained with", "give another run.name")
    assert snapshot(folder) == before


def test_a_finished_run_has_nothing_to_do(corpus: Path, stopped: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "copy"))
    (folder / "runs/bad/FINISHED").write_text('{"step": 16}\n')
    before = snapshot(folder)
    result = pretrain(corpus, folder)
    assert result.returncode == 0 and "is finished: its budget of 16 steps is used up; nothing to do" in result.stdout
    (folder / "runs/bad/FINISHED").write_text("")
    refused(pretrain(corpus, folder), "FINISHED: does not hold the step of the run's end; remove it")
    (folder / "runs/bad/FINISHED").write_text('{"step": 16}\n')
    assert snapshot(folder).keys() == before.keys()


def test_other_data_under_the_same_name(stopped: Path, tmp_path: Path) -> None:
    other = prepared(tmp_path, some_texts(300, seed=3)).folder
    before = snapshot(stopped)
    refused(pretrain(other, stopped), f"data.sources={other}", "was trained on other data", "run.name=")
    assert snapshot(stopped) == before


def test_data_that_was_moved_is_the_same_data(copied: Path, stopped: Path, tmp_path: Path) -> None:
    """Its name is part of the sample order; the run is made to look finished, so that nothing has to start."""
    folder = Path(shutil.copytree(stopped, tmp_path / "copy"))
    (folder / "runs/bad/FINISHED").write_text('{"step": 16}\n')
    words = [*WORDS, "run.name=bad"]
    renamed = longhaul("pretrain", *words, f"data.sources=[{{path: {copied}}}]", folder=folder)
    refused(renamed, "a corpus that was renamed also needs name=OLD_NAME")
    named = longhaul("pretrain", *words, f"data.sources=[{{path: {copied}, name: out}}]", folder=folder)
    assert named.returncode == 0 and "is finished" in named.stdout, named.stderr


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config.yaml", b"model: [", ["config.yaml: has 8 bytes, the manifest says"]),
        ("state.json", b"", ["state.json: has 0 bytes, the manifest says"]),
        ("manifest.json", b"{}", ["manifest.json: not the manifest of a Longhaul checkpoint"]),
        ("manifest.json", b'{"format": "longhaul-checkpoint", "ver', ["manifest.json: damaged"]),
    ],
)
def test_a_damaged_small_file_of_a_checkpoint(
    corpus: Path, stopped: Path, tmp_path: Path, file: str, content: bytes, expected: list[str]
) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "copy"))
    (folder / "runs/bad/checkpoints/step-00000005" / file).write_bytes(content)
    before = snapshot(folder)
    refused(pretrain(corpus, folder), "step-00000005", "no checkpoint can be used", *expected)
    assert snapshot(folder) == before


def test_a_flipped_byte_in_a_checkpoint(corpus: Path, stopped: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "copy"))
    weights = folder / "runs/bad/checkpoints/step-00000005/rank-00000.safetensors"
    flip_byte(weights)
    before = snapshot(folder)
    refused(longhaul("export", "checkpoint=runs/bad", "out=model", folder=folder), weights.name, "SHA-256")
    refused(longhaul("generate", "checkpoint=runs/bad", "prompt=x", folder=folder), weights.name, "SHA-256")
    assert snapshot(folder) == before
    refused(pretrain(corpus, folder), weights.name, "SHA-256", "no checkpoint can be used, all are left as they are")
    assert [path.name for path in (folder / "runs/bad/checkpoints").iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("verb", ["generate", "export"])
def test_a_folder_that_is_no_checkpoint(tmp_path: Path, verb: str) -> None:
    words = {"generate": ["prompt=x"], "export": ["out=model"]}[verb]
    refused(
        longhaul(verb, "checkpoint=nowhere", *words, folder=tmp_path), "checkpoint=nowhere: no such folder; give the folder"
    )
    (tmp_path / "empty").mkdir()
    refused(
        longhaul(verb, "checkpoint=empty", *words, folder=tmp_path), "checkpoint=empty: holds no checkpoint; give the folder"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_full_disk_during_a_save(corpus: Path, tmp_path: Path, small_disk: Path) -> None:
    result = pretrain(corpus, tmp_path, "model.hidden_size=128", f"run.folder={small_disk}", "budget.stop_at_step=1")
    assert result.returncode == 85 and "Traceback" not in result.stderr, result.stderr
    outcome = json.loads((small_disk / "bad/logs/attempt-01/outcome.json").read_text())
    assert "the last checkpoint could not be written" in outcome["reason"] and "MiB free" in outcome["reason"]
    assert "there is no other" in outcome["reason"]
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
    (text / "broken.txt").write_bytes(b"\xff\xfe no text")
    (text / "gone.txt").symlink_to("nowhere")
    words = ["corpus=text", f"corpus.paths=[{text}]", "tokenizer.vocab_size=300", "held_out_fraction=0.1", "output=out"]
    result = longhaul("prepare", *words, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert "broken.txt" in rejected
    assert "gone.txt" in rejected
    funnel = {row["step"]: row["documents"] for row in json.loads((tmp_path / "out/manifest.json").read_text())["funnel"]}
    assert {name: count for name, count in funnel.items() if count == 1}.keys() >= {"undecodable", "unreadable"}, funnel
