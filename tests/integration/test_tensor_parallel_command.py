"""Tensor-parallel ranks from the command line: a run moves from two ranks that share the model to one; both generate."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import longhaul
from tests.integration.runs import WORDS
from train.checkpoint.reader import CheckpointReader
from train.metrics.jsonl import read_metrics

pytestmark = pytest.mark.further

STOP, END = 4, 8


def words_of(corpus: Path, folder: Path, *more: str) -> list[str]:
    return [
        *WORDS, f"data.sources=[{{path: {corpus}}}]", f"run.folder={folder}", "run.name=shared", f"budget.steps={END}",
        "checkpoint.every_steps=2", "model.dropout=0", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensor")
    shared = ["parallel.tensor=2", "parallel.sequence_parallel=true", "launch.processes=2", f"budget.stop_at_step={STOP}"]
    first = longhaul("pretrain", *words_of(corpus, folder, *shared))
    assert first.returncode == 85, first.stderr + first.stdout
    assert "2 (1 data-parallel x 2 tensor-parallel with rows split)" in first.stdout
    second = longhaul("pretrain", *words_of(corpus, folder))
    assert second.returncode == 0, second.stderr + second.stdout
    return folder / "shared"


def test_the_curve_is_that_of_one_rank(run_dir: Path, corpus: Path, tmp_path: Path) -> None:
    alone = longhaul("pretrain", *words_of(corpus, tmp_path))
    assert alone.returncode == 0, alone.stderr + alone.stdout
    losses, expected = (
        [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if record.get("kind") == "train"]
        for folder in (run_dir, tmp_path / "shared")
    )
    assert len(losses) == len(expected) == END
    assert losses == pytest.approx(expected, abs=1e-5), "the bound of the parity tests"


def test_what_one_rank_wrote_and_two_ranks_wrote(run_dir: Path) -> None:
    folders = sorted((run_dir / "checkpoints").iterdir())
    layouts = {folder.name: CheckpointReader(folder).manifest.layout["tensor"] for folder in folders}
    assert set(layouts.values()) <= {1, 2} and list(layouts.values())[-1] == 1, layouts


def test_ranks_that_share_a_model_say_what_one_says(run_dir: Path) -> None:
    words = [
        "generate",
        f"checkpoint={run_dir}",
        "prompt=def main(",
        "temperature=0",
        "max_new_tokens=12",
        "device=cpu",
        "dtype=fp32",
    ]
    alone, shared = longhaul(*words), longhaul(*words, "tensor=2")
    assert alone.returncode == shared.returncode == 0, shared.stderr
    assert shared.stdout == alone.stdout != ""
    assert "tokens/s" in shared.stderr
    refused = longhaul(*words, "tensor=3")
    assert refused.returncode == 93 and "tensor=3: must divide the checkpoint's kv_heads, 2" in refused.stderr


def test_ranks_that_do_not_come_out_even_are_refused(corpus: Path, tmp_path: Path) -> None:
    refused = longhaul("plan", *words_of(corpus, tmp_path, "parallel.tensor=2", "launch.processes=3"))
    assert refused.returncode == 93 and "parallel.tensor=2: must divide the 3 processes" in refused.stderr
    assert not list(tmp_path.iterdir()), "a refused plan writes nothing"
